"""The guard around pipelines of flow matching: the same pictures, or none; what it refuses, and in which words."""

import shutil

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline, UniPCMultistepScheduler
from engines import edit_manifest
from flow_pipelines import LENGTH, SIDE, make_sd3
from guarded import Model, actions, calibrate, same, seeded

from memedge import Detector, InputError, Monitor, export_engine
from memedge.integrations.diffusers import guard

OPTIONS = {"num_inference_steps": 2, "output_type": "np", "max_sequence_length": LENGTH}


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd3")
    make_sd3(folder / "model")
    export_engine(folder / "model", folder / "engine", max_sequence_length=LENGTH)
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
    """Within `with`, keeps what the transformer is called with, and gives, but for the guard's own look."""

    def __init__(self, transformer):
        self.transformer, self.calls = transformer, []

    def __enter__(self):
        self.hook = self.transformer.register_forward_hook(self.see, with_kwargs=True)
        return self.calls

    def see(self, _transformer, _args, kwargs, output):
        if kwargs["timestep"].is_floating_point():
            self.calls.append((kwargs["timestep"].tolist(), output[0].double()))

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
    uncond, cond = calls[0][1].chunk(2)
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
    assert [len(output) for _, output in calls] == ([8, 8] if negative is None else [8, 4, 8])
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
    guarded, side = guard(pipe, detector), SIDE * pipe.vae_scale_factor
    for options, words in [
        (
            {"height": 4 * side, "width": 2 * side},
            f"pictures are of {2 * side}x{4 * side} pixels, and the engine's statistics of {side}x{side}: call the "
            f"pipeline with width={side} and height={side}, or export an engine with --size {2 * side}x{4 * side}.",
        ),
        ({"latents": torch.zeros(1, 4, SIDE, SIDE // 2)}, f"pictures are of {side // 2}x{side} pixels"),
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
    weight = pipe.transformer.transformer_blocks[1].attn.to_v.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
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
