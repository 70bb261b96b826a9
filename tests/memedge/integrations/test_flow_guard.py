"""The guard around pipelines of flow matching: the same pictures, or none; what it refuses, and in which words."""

import shutil

import flux
import numpy as np
import pytest
import qwen_image
import sd3 as stable_diffusion_3
import torch
import z_image
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    QwenImagePipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    ZImagePipeline,
)
from engines import edit_manifest
from guarded import Model, actions, calibrate, same, seeded

from memedge import Detector, InputError, Monitor, export_engine
from memedge.integrations.diffusers import guard

SIDE, LENGTH = 64, 4  # of pictures, in pixels; rows in place of T5, which is left out
OPTIONS = {"num_inference_steps": 2, "output_type": "np", "max_sequence_length": LENGTH, "height": SIDE, "width": SIDE}

FLUX = {"num_inference_steps": 2, "output_type": "np", "max_sequence_length": 20, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    stable_diffusion_3.build(folder / "model", t5=False)
    export_engine(folder / "model", folder / "engine", size=(SIDE, SIDE), max_sequence_length=LENGTH)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "model", text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return Model(pipe, *calibrate(folder / "engine"))


@pytest.fixture
def model(sd3):
    """With its own scheduler, and without a hook on its transformer before and after."""
    pipe = sd3.pipe
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert not pipe.transformer._forward_hooks
    yield sd3
    assert not pipe.transformer._forward_hooks


class Recorded:
    """Within `with`, keeps what the transformer gives, but for the guard's own look at Stable Diffusion 3."""

    def __init__(self, transformer):
        self.transformer, self.calls = transformer, []

    def __enter__(self):
        self.hook = self.transformer.register_forward_hook(self.see, with_kwargs=True)
        return self.calls

    def see(self, _transformer, _args, kwargs, output):
        if "timestep" not in kwargs or kwargs["timestep"].is_floating_point():
            self.calls.append(torch.stack(list(output[0])).double())

    def __exit__(self, *_):
        self.hook.remove()


def test_others_are_the_bare_pipelines(model):
    """Bit by bit, several images of each; the blocked one's are never made."""
    pipe, detector, clean, memorized = model
    prompts = [clean[0], memorized[0], clean[1]]
    options = OPTIONS | {"num_images_per_prompt": 2, "negative_prompt": ["red", "", "blue"]}
    bare = pipe(prompts, generator=[seeded(i) for i in range(6)], **options).images
    result = guard(pipe, detector)(prompts, generator=[seeded(i) for i in range(6)], **options)
    assert actions(result) == ["passed", "blocked", "passed"]
    assert [image is None for image in result.images] == [False, False, True, True, False, False]
    assert all(same(image, own) for image, own in zip(result.images, bare, strict=True) if image is not None)
    for own, verdict in zip(result.verdicts, detector.detect(prompts), strict=True):
        assert (own.prompt, own.score, own.reason) == (verdict.prompt, verdict.score, verdict.reason)
    with Recorded(pipe.transformer) as calls:
        assert guard(pipe, detector)(memorized, **OPTIONS).images == [None, None]
    assert calls == []


def test_flag(model):
    """Without guidance too."""
    pipe, detector, clean, memorized = model
    prompts = [memorized[0], clean[0]]
    bare = pipe(prompts, generator=seeded(), guidance_scale=1, **OPTIONS).images
    result = guard(pipe, detector, "flag")(prompts, generator=seeded(), guidance_scale=1, **OPTIONS)
    assert actions(result) == ["flagged", "passed"] and all(map(same, result.images, bare))


def test_what_is_read_otherwise_is_scored_as_embeddings(model):
    """Another prompt for the second text encoder, and embeddings; the scores are the same."""
    pipe, detector, clean, memorized = model
    with torch.no_grad():
        states, negative, pooled, negative_pooled = pipe.encode_prompt(
            clean[0], memorized[0], None, max_sequence_length=LENGTH
        )
    expected = detector.score_embeddings(states.numpy(), pooled.numpy())
    result = guard(pipe, detector, "flag")(clean[0], memorized[0], **OPTIONS)
    given = guard(pipe, detector, "flag")(
        prompt_embeds=states,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative,
        negative_pooled_prompt_embeds=negative_pooled,
        **OPTIONS,
    )
    assert result.verdicts[0].score == given.verdicts[0].score == expected.score[0]


def test_mitigated(model):
    """By the engine's own gradients; what is generated from is what was judged again."""
    pipe, detector, clean, memorized = model
    result = guard(pipe, detector, "mitigate")([clean[0], memorized[0]], generator=seeded(), **OPTIONS)
    verdict = result.verdicts[1]
    assert actions(result) == ["passed", "mitigated"] and result.images[1] is not None
    found = detector.score_embeddings(verdict.mitigation.states[None], verdict.mitigation.pooled[None])
    assert verdict.mitigation.score == found.score[0] < verdict.threshold
    bare = pipe([clean[0], memorized[0]], generator=seeded(), **OPTIONS).images
    assert same(result.images[0], bare[0]) and not same(result.images[1], bare[1])


@pytest.mark.parametrize("negative", [None, "a red star"])
def test_first_step(model, negative):
    """‖Δv‖ at σ = 1, against the empty prompt whatever the negative one is; no further pass without one."""
    pipe, detector, clean, memorized = model
    prompts, options = [clean[0], memorized[0]], OPTIONS | {"num_images_per_prompt": 2}
    with Recorded(pipe.transformer) as calls:
        bare = pipe(prompts, generator=seeded(), **options).images
    uncond, cond = calls[0].chunk(2)
    norms = (cond - uncond).flatten(1).norm(dim=1).reshape(2, 2).mean(1).tolist()
    if negative is not None:
        bare = pipe(prompts, generator=seeded(), negative_prompt=negative, **options).images
        options |= {"negative_prompt": negative}
    watched = guard(pipe, detector, first_step=float(np.mean(norms)))
    with Recorded(pipe.transformer) as calls:
        result = watched(prompts, generator=seeded(), **options)
    assert [verdict.norm for verdict in result.verdicts] == pytest.approx(norms, rel=1e-5)
    over = [norm >= np.mean(norms) for norm in norms]
    assert actions(result) == ["blocked" if one else "passed" for one in over]
    assert result.verdicts[0].reason.endswith("at timestep 1000")
    assert all(same(image, own) for image, own in zip(result.images, bare, strict=True) if image is not None)
    assert [len(output) for output in calls] == ([8, 8] if negative is None else [8, 4, 8])
    both = guard(pipe, detector, first_step=min(norms) / 2)
    with Recorded(pipe.transformer) as calls:
        assert both(prompts, generator=seeded(), **options).images == [None] * 4
    assert len(calls) <= 2  # the run ended with its first step


def test_skipped_layers(model):
    """Their calls beside the sampler's own are not taken for one."""
    pipe, detector, clean, _ = model
    options = OPTIONS | {"num_inference_steps": 4, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    bare = pipe(clean[0], generator=seeded(), **options).images
    result = guard(pipe, detector, first_step=1e9)(clean[0], generator=seeded(), **options)
    assert actions(result) == ["passed"] and same(result.images[0], bare[0])


def test_what_is_not_for_flow_matching(model):
    pipe, detector, clean, memorized = model
    name = "StableDiffusion3Pipeline generates by flow matching, where"
    for options, words in [
        ({"action": "steer"}, f"{name} action='steer' was never measured: use another action."),
        ({"monitor": True}, f"{name} the monitor was never measured: leave it out to have the prompts scored before."),
        ({"monitor": True, "action": "reseed"}, f"{name} the monitor was never measured: "),
    ]:
        with pytest.raises(InputError, match=words):
            guard(pipe, detector, **options)
    with pytest.raises(InputError, match=f"{name} the monitor was never measured"):
        Monitor.calibrate(pipe, memorized * 5, clean * 5, num_inference_steps=2, guidance_scale=4.0)
    with pytest.raises(InputError, match="guidance_scale is 1, so there is no guidance, which first_step needs"):
        guard(pipe, detector, first_step=1.0)(clean[0], guidance_scale=1, **OPTIONS)


def test_another_call_than_the_engines(model):
    """Statistics are of one size, length and spread of noise levels."""
    pipe, detector, clean, _ = model
    guarded = guard(pipe, detector)
    for options, words in [
        (
            {"height": 4 * SIDE, "width": 2 * SIDE},
            f"pictures are of {2 * SIDE}x{4 * SIDE} pixels, and the engine's statistics of {SIDE}x{SIDE}: call the "
            f"pipeline with width={SIDE} and height={SIDE}, or export an engine with --size {2 * SIDE}x{4 * SIDE}.",
        ),
        ({"latents": torch.zeros(1, 16, SIDE // 8, SIDE // 16)}, f"pictures are of {SIDE // 2}x{SIDE} pixels"),
        (
            {"max_sequence_length": 256},
            f"max_sequence_length is 256, and the engine's is {LENGTH}: call the pipeline with that one, or export an "
            "engine with --max-sequence-length 256.",
        ),
    ]:
        with pytest.raises(InputError, match=words):
            guarded(clean[0], **OPTIONS | options)
    for scheduler, words in [
        (FlowMatchEulerDiscreteScheduler(shift=5.0), "its shift of noise levels is 5.0, and not 3.0; make an engine"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "its shift of noise levels is None, and not 3.0"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=0.1), "its shift_terminal is 0.1, and not None"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "its scheduler is 'UniPCMultistepScheduler', and not 'Flow"),
    ]:
        pipe.scheduler = scheduler
        for call in (lambda: guard(pipe, detector), lambda: guarded(clean[0], **OPTIONS)):
            with pytest.raises(InputError, match=words):
                call()


def test_dynamic_shifting(model, tmp_path):
    """mu is that of the engine's size; a call may not give another."""
    pipe, detector, clean, _ = model
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    seen = []
    inner = pipe.scheduler.set_timesteps

    def set_timesteps(*args, mu=None, **kwargs):
        seen.append(mu)
        return inner(*args, mu=mu, **kwargs)

    pipe.scheduler.set_timesteps = set_timesteps
    pipe(clean[0], **OPTIONS | {"output_type": "latent"})
    copy = shutil.copytree(detector.info.path, tmp_path / "engine")
    edit_manifest(copy, lambda m: m["flow"].update(shift=None, mu=seen[0]))
    guarded = guard(pipe, Detector.load(copy))
    assert actions(guarded(clean[0], **OPTIONS)) == ["passed"]
    with pytest.raises(InputError, match=r"mu is 2\.5, and that of the engine's size is .*: leave it out"):
        guarded(clean[0], mu=2.5, **OPTIONS)
    edit_manifest(copy, lambda m: m["flow"].update(mu=seen[0] + 0.01))
    with pytest.raises(InputError, match="its mu of noise levels is"):
        guard(pipe, Detector.load(copy))


def test_another_model(model, engine):
    """An edited transformer, an adapter of pictures, and a UNet's engine."""
    pipe, detector, clean, _ = model
    guarded = guard(pipe, detector)
    weight = pipe.transformer.proj_out.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.1)
    try:
        with pytest.raises(InputError, match="The pipeline's transformer is not the engine's model"):
            guarded(clean[0], **OPTIONS)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    pipe.transformer.image_proj = torch.nn.Identity()
    try:
        with pytest.raises(InputError, match="The pipeline has an IP-Adapter"):
            guarded(clean[0], **OPTIONS)
    finally:
        del pipe.transformer.image_proj
    hook = pipe.transformer.register_forward_hook(lambda *_: None)
    assert "the pipeline has 1 hook on the transformer" in guarded(clean[0], **OPTIONS).verdicts[0].reason
    hook.remove()
    with pytest.raises(InputError, match="its prediction type is 'flow', and not 'epsilon'"):
        guard(pipe, Detector.load(engine), first_step=1.0)
    own = pipe.__call__

    class Other(StableDiffusion3Pipeline):
        def __call__(self, prompt=None, **kwargs):
            return own(prompt, **kwargs)

    with pytest.raises(InputError, match=r"does not know how Other generates: guard one of .*StableDiffusion3Pipeline"):
        guard(Other(**pipe.components), detector)


@pytest.fixture(scope="module")
def flux_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flux")
    flux.build(folder / "model")
    export_engine(folder / "model", folder / "engine", size=(64, 96), max_sequence_length=FLUX["max_sequence_length"])
    pipe = FluxPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    return Model(pipe, *calibrate(folder / "engine"))


@pytest.mark.slow
def test_flux(flux_model):
    """Without true guidance, and with it."""
    pipe, detector, clean, memorized = flux_model
    prompts = [clean[0], memorized[0], clean[1]]
    for more in ({}, {"negative_prompt": ["red", "", "blue"], "true_cfg_scale": 2.0}):
        options = FLUX | {"num_images_per_prompt": 2} | more
        bare = pipe(prompts, generator=seeded(), **options).images
        result = guard(pipe, detector)(prompts, generator=seeded(), **options)
        assert actions(result) == ["passed", "blocked", "passed"]
        assert all(same(image, own) for image, own in zip(result.images, bare, strict=True) if image is not None)
        assert result.verdicts[1].score == detector.detect(memorized[:1])[0].score
    result = guard(pipe, detector, "mitigate")([clean[0], memorized[0]], **FLUX)
    assert actions(result) == ["passed", "mitigated"] and result.images[1] is not None
    for options, words in [
        ({"guidance_scale": 5.0}, "guidance_scale is 5.0, and the engine's model is told 3.5: call the pipeline with"),
        ({"width": 64}, "pictures are of 64x64 pixels, and the engine's statistics of 96x64"),
        ({"max_sequence_length": 512}, "max_sequence_length is 512, and the engine's is 20"),
    ]:
        with pytest.raises(InputError, match=words):
            guard(pipe, detector)(clean[0], **FLUX | options)


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "a red star"])
def test_first_step_of_flux(flux_model, negative):
    """Its two calls are one step; the empty negative prompt is ε_0 itself."""
    pipe, detector, clean, _ = flux_model
    options = FLUX | {"num_images_per_prompt": 2, "true_cfg_scale": 2.0}
    with Recorded(pipe.transformer) as calls:
        pipe(clean[0], generator=seeded(), negative_prompt="", **options)
    norm = float((calls[0] - calls[1]).flatten(1).norm(dim=1).mean())
    bare = pipe(clean[0], generator=seeded(), negative_prompt=negative, **options).images
    with Recorded(pipe.transformer) as calls:
        result = guard(pipe, detector, first_step=2 * norm)(
            clean[0], generator=seeded(), negative_prompt=negative, **options
        )
    assert result.verdicts[0].norm == pytest.approx(norm, rel=1e-5) and actions(result) == ["passed"]
    assert result.verdicts[0].reason.endswith("at timestep 1000") and all(map(same, result.images, bare))
    assert len(calls) == (4 if negative == "" else 5)
    watched = guard(pipe, detector, first_step=norm / 2)
    assert watched(clean[0], negative_prompt=negative, **options).images == [None, None]
    with pytest.raises(InputError, match="FluxPipeline makes no unguided prediction without a negative prompt, and"):
        watched(clean[0], **options)
    with pytest.raises(InputError, match=r"true_cfg_scale is 1\.0, so there is no guidance, which first_step needs"):
        watched(clean[0], negative_prompt=negative, **FLUX)


LONG = "a red star and a photo of the left background of the objects and a color and a size and a cat and a star"
FREE = {"num_inference_steps": 2, "output_type": "np", "max_sequence_length": 40, "height": 128, "width": 64}


@pytest.fixture(scope="module", params=["QwenImagePipeline", "ZImagePipeline"])
def free(request, tmp_path_factory):
    """A model whose embeddings are as long as prompts are, its scale of guidance, and whether it is Qwen-Image."""
    qwen, folder = request.param == "QwenImagePipeline", tmp_path_factory.mktemp("free")
    (qwen_image if qwen else z_image).build(folder / "model")
    export_engine(folder / "model", folder / "engine", size=(128, 64), max_sequence_length=40)
    pipe = (QwenImagePipeline if qwen else ZImagePipeline).from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    guides = {"true_cfg_scale": 2.0} if qwen else {"guidance_scale": 0.5}
    return Model(pipe, *calibrate(folder / "engine")), guides, qwen


@pytest.mark.slow
def test_embeddings_of_any_length(free):
    """The blocked prompt is the longest, so that the batch is no longer padded to it; lists stay the caller's."""
    (pipe, detector, clean, _), guides, qwen = free
    prompts = [clean[0], LONG, clean[1]]
    unguided = {"true_cfg_scale": 1.0} if qwen else {"guidance_scale": 0}
    for more in (unguided, guides | {"negative_prompt": ["a", "", LONG]}):
        options = FREE | {"num_images_per_prompt": 2} | more
        given = {name: list(value) if isinstance(value, list) else value for name, value in options.items()}
        bare = pipe(list(prompts), generator=seeded(), **given).images  # Z-Image's writes into lists
        result = guard(pipe, detector)(prompts, generator=seeded(), **options)
        assert actions(result) == ["passed", "blocked", "passed"]
        assert all(same(image, own) for image, own in zip(result.images, bare, strict=True) if image is not None)
        assert [verdict.prompt for verdict in result.verdicts] == prompts == [clean[0], LONG, clean[1]]
        assert result.verdicts[1].score == detector.detect([LONG])[0].score
    with torch.no_grad():
        embeddings, other = pipe.encode_prompt(list(prompts), max_sequence_length=40)
    given = {"prompt_embeds_mask": other} if qwen else {"negative_prompt_embeds": other}
    result = guard(pipe, detector, "flag")(prompt_embeds=embeddings, **given, **FREE)
    assert actions(result) == ["passed", "flagged", "passed"]
    expected = detector.score_embeddings(embeddings, mask=other if qwen else None)
    assert [verdict.score for verdict in result.verdicts] == expected.score.tolist()


@pytest.mark.slow
def test_mitigated_embeddings_of_any_length(free):
    (pipe, detector, clean, memorized), guides, _ = free
    result = guard(pipe, detector, "mitigate")([LONG, clean[0], memorized[0]], generator=seeded(), **FREE | guides)
    bare = pipe([LONG, clean[0], memorized[0]], generator=seeded(), **FREE | guides).images
    assert actions(result)[1:] == ["passed", "mitigated"]
    assert same(result.images[1], bare[1]) and not same(result.images[2], bare[2])
    found = result.verdicts[2].mitigation
    assert found.score == detector.score_embeddings([found.states]).score[0] < result.verdicts[2].threshold
    own, _ = pipe.encode_prompt([LONG], max_sequence_length=40)
    assert len(found.states) < len(result.verdicts[0].mitigation.states) == len(own[0])


@pytest.mark.slow
@pytest.mark.parametrize("negative", ["", "a red star"])
def test_first_step_of_any_length(free, negative):
    """‖Δv‖ at σ = 1 against the empty prompt, whichever half comes first."""
    (pipe, detector, clean, _), guides, qwen = free
    options = FREE | {"num_images_per_prompt": 2} | guides
    with Recorded(pipe.transformer) as calls:
        pipe([clean[0], LONG], generator=seeded(), negative_prompt=["", ""], **options)
    cond, uncond = calls[:2] if qwen else calls[0].chunk(2)
    norms = (cond - uncond).flatten(1).norm(dim=1).reshape(2, 2).mean(1).tolist()
    bare = pipe([clean[0], LONG], generator=seeded(), negative_prompt=[negative] * 2, **options).images
    if qwen or negative:
        options |= {"negative_prompt": [negative] * 2}
    watched = guard(pipe, detector, first_step=float(np.mean(norms)))
    with Recorded(pipe.transformer) as calls:
        result = watched([clean[0], LONG], generator=seeded(), **options)
    assert [verdict.norm for verdict in result.verdicts] == pytest.approx(norms, rel=1e-5)
    assert actions(result) == ["passed", "blocked"] and result.verdicts[0].reason.endswith("at timestep 1000")
    assert all(same(image, own) for image, own in zip(result.images[:2], bare[:2], strict=True))
    assert len(calls) == (4 if qwen else 2) + (negative != "")
    both = guard(pipe, detector, first_step=min(norms) / 2)
    with Recorded(pipe.transformer) as calls:
        assert both([clean[0], LONG], generator=seeded(), **options).images == [None] * 4
    assert len(calls) == (2 if qwen else 1) + (negative != "")


@pytest.mark.slow
def test_refused_of_any_length(free):
    (pipe, detector, clean, _), guides, qwen = free
    name = type(pipe).__name__
    with pytest.raises(InputError, match=f"{name} generates by flow matching, where action='steer' was never measured"):
        guard(pipe, detector, "steer")
    guarded, watched = guard(pipe, detector), guard(pipe, detector, first_step=1e9)
    states, other = pipe.encode_prompt([clean[0]], max_sequence_length=40)
    wrong = [states] if qwen else torch.stack(states)
    for call, options, words in [
        (guarded, {"width": 128}, "pictures are of 128x128 pixels, and the engine's statistics of 64x128"),
        (guarded, {"width": None}, "pictures are of 1024x128 pixels"),
        (guarded, {"max_sequence_length": 64}, "max_sequence_length is 64, and the engine's is 40"),
        (guarded, {"prompt": None, "prompt_embeds": wrong}, f"is {type(wrong).__name__}: give a .*torch tensor"),
        (watched, {"true_cfg_scale" if qwen else "guidance_scale": 0.0}, "is 0.0, so there is no guidance, which"),
    ]:
        with pytest.raises(InputError, match=words):
            call(**{"prompt": clean[0], "negative_prompt": ""} | FREE | guides | options)
    if qwen:
        with pytest.raises(InputError, match="QwenImagePipeline makes no unguided prediction without a neg"):
            watched(clean[0], **FREE | guides)
        with pytest.raises(InputError, match="max_sequence_length is 20, and the engine's is 40"):  # they would be cut
            guarded(prompt_embeds=states, prompt_embeds_mask=other, **FREE | {"max_sequence_length": 20})
    else:
        assert actions(watched(clean[0], cfg_truncation=0.1, **FREE)) == ["passed"]  # the second step is not guided
