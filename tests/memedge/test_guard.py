"""The guard around real diffusers pipelines: the same pictures, or none; its verdicts; its hook; every mistake."""

import copy as copying
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from engines import PROVENANCE, edit_manifest
from guarded import EMOJI, make_pipe, recorded
from PIL import Image
from pipelines import make

from memedge import Detector, InputError
from memedge.engine.errors import NotFiniteError
from memedge.export.export import export
from memedge.integrations.diffusers import GuardedOutput, guard

MEMORIZED = ["small locked with pen drawing", "the left luggage sign"]
CLEAN = ["cute ship", "a briefcase"]
SCHEDULERS = [
    DDIMScheduler,
    EulerDiscreteScheduler,
    EulerAncestralDiscreteScheduler,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    PNDMScheduler,
]
# diffusers 0.42.1 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
GIVEN = {"gamma_norm": 1.0, "gamma_alignment": 0.0, "alignment": "channel", "operands": "uncond_delta", **PROVENANCE}


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a, b) -> bool:
    """Whether two images, arrays or tensors are equal bit by bit."""
    return type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))


def actions(result: GuardedOutput) -> list[str]:
    return [verdict.action for verdict in result.verdicts]


def mean_norms(output: torch.Tensor, prompts: int) -> list[float]:
    """‖Δ‖ by its definition, from the two halves of a UNet's output: the mean over each prompt's images."""
    uncond, cond = output.chunk(2)
    return (cond - uncond).flatten(1).norm(dim=1).reshape(prompts, -1).mean(1).tolist()


@pytest.fixture(scope="module")
def emoji():
    """A pipeline of the embedded model, whose scheduler tests replace."""
    return make_pipe(StableDiffusionPipeline)


@pytest.fixture
def pipe(emoji):
    """The same with its own scheduler, and without a hook on its UNet before and after."""
    emoji.scheduler = DDIMScheduler.from_pretrained(EMOJI / "scheduler")
    assert not emoji.unet._forward_hooks
    yield emoji
    assert not emoji.unet._forward_hooks


@pytest.fixture(scope="module")
def random_pipe(checkpoint):
    """A pipeline of the random checkpoint."""
    return make_pipe(StableDiffusionPipeline, checkpoint)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A random SDXL pipeline, and its engine, calibrated to the norm: the last two of four prompts are memorized."""
    folder = tmp_path_factory.mktemp("sdxl")
    checkpoint = make(folder / "checkpoint", "sdxl")
    export(checkpoint, folder / "engine")
    prompts = ["a star", "zebra on skis", "two cats", "moon"]
    norms = Detector.load(folder / "engine").score(prompts).norm
    order = np.argsort(norms)
    threshold = float(norms[order[1:3]].mean())
    edit_manifest(folder / "engine", lambda m: m.update(calibrations={"cpu-fp32": GIVEN | {"threshold": threshold}}))
    pipe = make_pipe(StableDiffusionXLPipeline, checkpoint)
    return pipe, Detector.load(folder / "engine"), [prompts[i] for i in order]


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_others_are_the_bare_pipelines(pipe, detector, kind):
    """In a mixed batch too, bit by bit, with schedulers that draw noise at each step too."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts = [CLEAN[0], MEMORIZED[0], CLEAN[1]]
    options = {"num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np"}
    bare = pipe(prompts, generator=seeded(), **options).images
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector)(prompts, generator=seeded(), **options)
    assert actions(result) == ["passed", "blocked", "passed"]
    assert [image is None for image in result.images] == [False, False, True, True, False, False]
    assert all(same(image, own) for image, own in zip(result.images, bare, strict=True) if image is not None)
    assert result.output.images is not bare and result.output.images[2:4] == [None, None]
    # The memorized one's picture was not only withheld, but never made.
    uncond, cond = calls[0].output.chunk(2)
    with recorded(pipe.unet) as own:
        pipe(prompts, generator=seeded(), **options)
    theirs = own[0].output.chunk(2)
    assert torch.equal(uncond, theirs[0])
    assert [torch.equal(a, b) for a, b in zip(cond, theirs[1], strict=True)] == [True, True, False, False, True, True]


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_nothing_blocked(pipe, detector, output_type):
    options = {"num_inference_steps": 2, "output_type": output_type, "negative_prompt": ["red", ""]}
    generators = [seeded(i) for i in range(4)]
    bare = pipe(CLEAN, generator=generators, num_images_per_prompt=2, **options)
    generators = [seeded(i) for i in range(4)]
    result = guard(pipe, detector)(CLEAN, generator=generators, num_images_per_prompt=2, **options)
    assert actions(result) == ["passed", "passed"]
    assert len(result.images) == 4
    assert all(map(same, result.images, bare.images))
    assert type(result.output) is type(bare) and type(result.output.images) is type(bare.images)
    assert not any(map(same, result.images, result.images[1:]))
    if output_type == "pil":
        assert all(isinstance(image, Image.Image) for image in result.images)


def test_all_blocked(pipe, detector):
    """Nothing is generated; each verdict is the detector's."""
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "block")(MEMORIZED, num_images_per_prompt=3)
    assert calls == []
    assert result.images == [None] * 6 and result.output is None
    for own, verdict in zip(result.verdicts, detector.detect(MEMORIZED), strict=True):
        assert (own.prompt, own.score, own.norm) == (verdict.prompt, verdict.score, verdict.norm)
        assert (own.action, own.threshold, own.reason) == ("blocked", verdict.threshold, verdict.reason)
        assert own.mitigation is None
    single = guard(pipe, detector)(MEMORIZED[0], num_inference_steps=2)
    assert single.images == [None] and actions(single) == ["blocked"]


def test_flag(pipe, detector):
    """Flagged ones are generated as asked for."""
    prompts = [MEMORIZED[0], CLEAN[0]]
    bare = pipe(prompts, num_inference_steps=2, generator=seeded(), guidance_scale=1, output_type="np").images
    result = guard(pipe, detector, "flag")(
        prompts, num_inference_steps=2, generator=seeded(), guidance_scale=1, output_type="np"
    )
    assert actions(result) == ["flagged", "passed"]
    assert all(map(same, result.images, bare))


def test_callbacks_and_rescaling(pipe, detector):
    """What a call does at each step stays as it is."""
    seen = []

    def end(_pipe, step, _timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 0.9}

    options = {"num_inference_steps": 3, "guidance_rescale": 0.7, "callback_on_step_end": end, "output_type": "latent"}
    bare = pipe(CLEAN, 32, 32, generator=seeded(), **options).images
    result = guard(pipe, detector)(CLEAN, 32, 32, generator=seeded(), **options)
    assert seen == [0, 1, 2] * 2
    assert all(map(same, result.images, bare))


def test_given_latents(pipe, detector):
    latents = torch.randn(2, 4, 32, 32, generator=seeded())
    options = {"latents": latents, "num_inference_steps": 2, "output_type": "latent"}
    bare = pipe([CLEAN[0], MEMORIZED[0]], **options).images
    result = guard(pipe, detector)([CLEAN[0], MEMORIZED[0]], **options)
    assert same(result.images[0], bare[0]) and result.images[1] is None


def test_embeddings(pipe, detector):
    """Embeddings are scored as such; the blocked one is replaced by the other."""
    prompts = [MEMORIZED[0], CLEAN[0]]
    with torch.no_grad():
        states, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
    options = {"num_inference_steps": 2, "output_type": "np", "negative_prompt_embeds": uncond}
    bare = pipe(prompt_embeds=states, generator=seeded(), **options).images
    given = states.clone()
    result = guard(pipe, detector)(prompt_embeds=given, generator=seeded(), **options)
    assert torch.equal(given, states)
    assert result.images[0] is None and same(result.images[1], bare[1])
    scores = detector.score_embeddings(states.numpy())
    assert [v.score for v in result.verdicts] == scores.score.tolist()
    assert [v.prompt for v in result.verdicts] == [None, None]
    assert result.verdicts[0].reason.startswith("score ") and "≥ threshold" in result.verdicts[0].reason
    assert "< threshold" in result.verdicts[1].reason
    np.testing.assert_allclose(scores.score, detector.score(prompts).score, rtol=1e-4)


def test_what_the_unet_gets_is_scored(pipe, detector):
    """Not the text alone, where more than the text decides: layers left out, and learnt words."""
    result = guard(pipe, detector, "flag")(CLEAN, clip_skip=1, num_inference_steps=2, output_type="latent")
    with torch.no_grad():
        skipped = pipe.encode_prompt(CLEAN, "cpu", 1, False, clip_skip=1)[0]
    expected = detector.score_embeddings(skipped.numpy())
    assert [v.score for v in result.verdicts] == expected.score.tolist()
    assert [v.prompt for v in result.verdicts] == CLEAN
    own = make_pipe(StableDiffusionPipeline)
    with torch.no_grad():
        concept = own.text_encoder.get_input_embeddings().weight[own.tokenizer(MEMORIZED[0]).input_ids[2]].clone()
    own.load_textual_inversion(concept[None], token="<Learnt>")
    result = guard(own, detector)("small <learnt> with pen drawing", num_inference_steps=2)
    assert actions(result) == ["blocked"]
    assert detector.detect(["small <learnt> with pen drawing"])[0].memorized is False


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_first_step_is_the_norm(pipe, detector, kind):
    """By torch, from the UNet's own first output; the pictures are the bare pipeline's, with no call added."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts = [CLEAN[0], MEMORIZED[0]]
    options = {
        "num_inference_steps": 5,
        "num_images_per_prompt": 2,
        "output_type": "np",
        "negative_prompt": ["", "red"],
    }
    with recorded(pipe.unet) as calls:
        bare = pipe(prompts, generator=seeded(), **options).images
    norms = mean_norms(calls[0].output, 2)
    assert norms[0] < norms[1]
    guarded = guard(pipe, detector, first_step=sum(norms) / 2)
    with recorded(pipe.unet) as again:
        result = guarded(prompts, generator=seeded(), **options)
    assert len(again) == len(calls) and all(torch.equal(a.output, b.output) for a, b in zip(calls, again, strict=True))
    assert [v.norm for v in result.verdicts] == pytest.approx(norms, rel=1e-5)
    assert actions(result) == ["passed", "blocked"]
    assert all(map(same, result.images[:2], bare[:2])) and result.images[2:] == [None, None]
    assert {v.threshold for v in result.verdicts} == {sum(norms) / 2}
    assert all(v.score is None and f"timestep {calls[0].timestep:g}" in v.reason for v in result.verdicts)


def test_first_step_ends_the_run(pipe, detector):
    """After one call, if all are over the threshold; not to flag them; and the threshold itself is over it."""
    with recorded(pipe.unet) as calls:
        bare = pipe(MEMORIZED, num_inference_steps=4, generator=seeded(), output_type="np").images
        norms = mean_norms(calls[0].output, 2)
        del calls[:]
        options = {"num_inference_steps": 4, "output_type": "np"}
        result = guard(pipe, detector, first_step=min(norms) * (1 - 1e-6))(MEMORIZED, generator=seeded(), **options)
        assert len(calls) == 1
        assert result.images == [None, None] and result.output is None and actions(result) == ["blocked"] * 2
        exact = guard(pipe, detector, first_step=result.verdicts[0].norm)
        assert actions(exact(MEMORIZED[0], generator=seeded(), num_inference_steps=4)) in (["blocked"], ["passed"])
        flagged = guard(pipe, detector, "flag", first_step=min(norms) * (1 - 1e-6))
        result = flagged(MEMORIZED, generator=seeded(), **options)
    assert actions(result) == ["flagged"] * 2 and all(map(same, result.images, bare))
    again = pipe(MEMORIZED, num_inference_steps=4, generator=seeded(), output_type="np").images
    assert all(map(same, again, bare))  # an ended run leaves nothing behind


def test_first_step_of_embeddings(pipe, detector):
    with torch.no_grad():
        states, uncond = pipe.encode_prompt(MEMORIZED, "cpu", 1, True)
    result = guard(pipe, detector, first_step=0.1)(
        prompt_embeds=states, negative_prompt_embeds=uncond, num_inference_steps=2
    )
    assert result.images == [None, None] and [v.prompt for v in result.verdicts] == [None, None]


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_first_step_of_v_prediction(random_pipe, copy, kind, karras):
    """Scaled to ε by ᾱ of the scheduler's own first σ, also between two trained timesteps."""
    edit_manifest(copy, lambda m: m.update(prediction_type="v_prediction"))
    options = {"use_karras_sigmas": True} if karras and kind is not DDIMScheduler else {}
    random_pipe.scheduler = kind.from_config(random_pipe.scheduler.config, prediction_type="v_prediction", **options)
    with recorded(random_pipe.unet) as calls:
        result = guard(random_pipe, Detector.load(copy), "flag", first_step=1.0)(
            ["a star", "moon"], num_inference_steps=3, output_type="latent"
        )
    if kind is DDIMScheduler:
        alpha = float(random_pipe.scheduler.alphas_cumprod[int(calls[0].timestep)])
    else:
        sigma = float(random_pipe.scheduler.sigmas[0])
        alpha = 1 / (1 + sigma**2)
    expected = np.array(mean_norms(calls[0].output, 2)) * alpha**0.5 / (1 - alpha)
    assert [v.norm for v in result.verdicts] == pytest.approx(expected, rel=1e-3)


def test_no_signal_at_the_first_step(random_pipe, copy):
    edit_manifest(copy, lambda m: m.update(prediction_type="v_prediction"))
    random_pipe.scheduler = DDIMScheduler.from_config(
        random_pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    with pytest.raises(InputError, match="zero terminal SNR"):
        guard(random_pipe, Detector.load(copy), first_step=1.0)("a star", num_inference_steps=2)
    assert not random_pipe.unet._forward_hooks


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hook_is_removed_after_errors(pipe, detector, error):
    def end(*_):
        assert len(pipe.unet._forward_hooks) == 1
        raise error

    with pytest.raises(error):
        guard(pipe, detector, first_step=1e9)("a star", num_inference_steps=2, callback_on_step_end=end)
    assert not pipe.unet._forward_hooks
    with pytest.raises(ValueError, match="divisible by 8"):
        guard(pipe, detector, first_step=1e9)("a star", height=31)
    assert not pipe.unet._forward_hooks
    latents = torch.full((1, 4, 32, 32), torch.nan)
    with pytest.raises(NotFiniteError):
        guard(pipe, detector, first_step=1e9)("a star", latents=latents, num_inference_steps=2)


def test_first_step_without_its_halves(pipe, detector):
    guarded = guard(pipe, detector, first_step=1.0)
    for scale in (1, 0.0):
        with pytest.raises(InputError, match=f"guidance_scale is {scale}, so there is no guidance"):
            guarded("a star", guidance_scale=scale)

    class Unguided(StableDiffusionPipeline):
        do_classifier_free_guidance = False

    with pytest.raises(InputError, match="had 2 rows for 2 images, not two for each"):
        guard(Unguided(**pipe.components, requires_safety_checker=False), detector, first_step=1.0)(CLEAN)


def test_threads_that_share_a_unet(pipe, detector):
    """A guard sees its own thread's call, and not what another calls the same UNet with in the meantime."""
    other = pipe.__class__(**(pipe.components | {"scheduler": copying.deepcopy(pipe.scheduler)}))
    inside = []

    def encode(*args, **kwargs):
        """Before its first call, let another thread run all of its own."""
        thread = threading.Thread(
            target=lambda: inside.extend(other([*CLEAN, "a star"], num_inference_steps=2, output_type="latent").images)
        )
        thread.start()
        thread.join()
        return type(pipe).encode_prompt(pipe, *args, **kwargs)

    expected = guard(pipe, detector, "flag", first_step=1.0)(CLEAN[0], generator=seeded(), num_inference_steps=2)
    pipe.encode_prompt = encode
    try:
        result = guard(pipe, detector, "flag", first_step=1.0)(CLEAN[0], generator=seeded(), num_inference_steps=2)
    finally:
        del pipe.encode_prompt
    assert len(inside) == 3
    assert result.verdicts == expected.verdicts


def test_unet_whose_hooks_do_not_run(pipe, detector):
    """As of some that are compiled: the pictures are not handed out unseen."""
    run = type(pipe.unet).forward
    pipe.unet = Wrapped(pipe.unet)
    try:
        with pytest.raises(InputError, match="could not be seen"):
            guard(pipe, detector, first_step=1e9)("a star", num_inference_steps=2)
    finally:
        pipe.unet = pipe.unet.inner
    assert type(pipe.unet).forward is run


class Wrapped(torch.nn.Module):
    """Calls another module's forward, past all hooks."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner, self.config, self.dtype = inner, inner.config, inner.dtype

    def __call__(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


def test_sdxl(sdxl):
    """Scored as text, as embeddings with pooled ones, and with a second prompt; in a batch with a blocked one."""
    pipe, detector, prompts = sdxl
    options = {"num_inference_steps": 2, "output_type": "np"}
    mixed = [prompts[3], prompts[0]]
    bare = pipe(mixed, generator=seeded(), **options).images
    result = guard(pipe, detector)(mixed, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"]
    assert result.images[0] is None and same(result.images[1], bare[1])
    assert actions(guard(pipe, detector)(prompts, prompt_2=prompts, **options)) == ["passed"] * 2 + ["blocked"] * 2

    with torch.no_grad():
        states, uncond, pooled, uncond_pooled = pipe.encode_prompt(mixed, device="cpu", num_images_per_prompt=1)
    given = {"prompt_embeds": states, "pooled_prompt_embeds": pooled}
    given |= {"negative_prompt_embeds": uncond, "negative_pooled_prompt_embeds": uncond_pooled}
    result = guard(pipe, detector)(generator=seeded(), **given, **options)
    assert actions(result) == ["blocked", "passed"] and same(result.images[1], bare[1])
    with pytest.raises(InputError, match="needs pooled prompt embeddings"):
        guard(pipe, detector)(prompt_embeds=states)

    # Each encoder reads its own prompt, and so neither alone is what is scored.
    swapped = pipe(mixed, prompt_2=mixed[::-1], generator=seeded(), **options).images
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(mixed, prompt_2=mixed[::-1], device="cpu", num_images_per_prompt=1)
    result = guard(pipe, detector, "flag")(mixed, prompt_2=mixed[::-1], generator=seeded(), **options)
    assert all(map(same, result.images, swapped))
    expected = detector.score_embeddings(states.numpy(), pooled.numpy())
    assert [v.score for v in result.verdicts] == expected.score.tolist()
    assert [v.action == "flagged" for v in result.verdicts] == expected.memorized.tolist()

    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, first_step=1e9)(mixed, generator=seeded(), num_images_per_prompt=2, **options)
    assert [v.norm for v in result.verdicts] == pytest.approx(mean_norms(calls[0].output, 2), rel=1e-5)


def test_pictures_to_pictures(detector):
    """Prompts are scored there as anywhere; the first step, which does not start from noise, is not measured."""
    pipe = make_pipe(StableDiffusionImg2ImgPipeline)
    picture = Image.new("RGB", (32, 32), "red")
    prompts = [CLEAN[0], MEMORIZED[0]]
    options = {"image": [picture] * 2, "num_inference_steps": 4, "output_type": "np"}
    bare = pipe(prompts, generator=seeded(), **options).images
    result = guard(pipe, detector)(prompts, generator=seeded(), **options)
    assert actions(result) == ["passed", "blocked"]
    assert same(result.images[0], bare[0]) and result.images[1] is None
    with pytest.raises(InputError, match="starts from a picture, not from noise alone"):
        guard(pipe, detector, first_step=1.0)
    inpaint = StableDiffusionInpaintPipeline.from_pipe(pipe)
    result = guard(inpaint, detector)(
        prompts, image=[picture] * 2, mask_image=picture.convert("L"), height=32, width=32, num_inference_steps=4
    )
    assert actions(result) == ["passed", "blocked"]


def test_mitigate(pipe, detector):
    """Generated from embeddings that score under the threshold; clean ones, bit by bit, from their own."""
    prompts = [CLEAN[0], MEMORIZED[0], MEMORIZED[0]]
    options = {"num_inference_steps": 2, "output_type": "np", "negative_prompt": ["", "red", ""]}
    bare = pipe(prompts, generator=seeded(), **options).images
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "mitigate")(prompts, generator=seeded(), **options)
    assert actions(result) == ["passed", "mitigated", "mitigated"]
    assert same(result.images[0], bare[0]) and not same(result.images[1], bare[1])
    states = calls[0].states.chunk(2)[1]
    assert torch.equal(states[1], states[2])
    found = detector.score_embeddings(states[1:].numpy())
    assert not found.memorized.any()
    before = detector.score(prompts)
    for verdict in result.verdicts[1:]:
        assert verdict.score == pytest.approx(before.score[1], rel=1e-5)
        assert verdict.mitigation.succeeded
        assert verdict.mitigation.before == pytest.approx(before.score[1], rel=1e-4)
        assert verdict.mitigation.after == pytest.approx(found.score[0], rel=1e-4)
        assert "mitigated: score " in verdict.reason
    assert result.verdicts[0].mitigation is None
    assert actions(guard(pipe, detector, "mitigate")(CLEAN[0], num_inference_steps=1)) == ["passed"]


def test_mitigation_that_fails(pipe, detector, monkeypatch):
    """Not under the threshold, or not for the caller's own detector, or of no text: none of it passes."""
    guarded = guard(pipe, detector, "mitigate")
    mitigator, embedding = type(guarded._mitigator), guarded._mitigator.embedding
    prompts, options = [MEMORIZED[0], CLEAN[0]], {"num_inference_steps": 1, "output_type": "latent"}
    bare = pipe(prompts, generator=seeded(), **options).images

    monkeypatch.setattr(mitigator, "embedding", lambda _, prompt: embedding(prompt, steps=0))
    result = guarded(prompts, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"] and result.images[0] is None and same(result.images[1], bare[1])
    assert "; not mitigated: score" in result.verdicts[0].reason and not result.verdicts[0].mitigation.succeeded
    assert guarded(MEMORIZED[0], **options).output is None

    unmoved = replace(embedding(MEMORIZED[0], steps=0), succeeded=True)
    monkeypatch.setattr(mitigator, "embedding", lambda *_: unmoved)
    result = guarded(prompts, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"] and result.images[0] is None and same(result.images[1], bare[1])
    assert "mitigated, but still score" in result.verdicts[0].reason

    with torch.no_grad():
        states, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
    result = guarded(prompt_embeds=states, negative_prompt_embeds=uncond, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"] and same(result.images[1], bare[1])
    assert "only text that the engine's own text encoder reads can be mitigated" in result.verdicts[0].reason


def test_mitigate_sdxl(sdxl):
    """The pooled embeddings take part."""
    pipe, detector, prompts = sdxl
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "mitigate")(
            [prompts[2], prompts[0]], num_inference_steps=1, output_type="latent"
        )
    assert actions(result) == ["mitigated", "passed"]
    mitigation = result.verdicts[0].mitigation
    np.testing.assert_array_equal(calls[0].states[2].numpy(), mitigation.states)
    assert not detector.score_embeddings(mitigation.states[None], mitigation.pooled[None]).memorized.any()


def test_half_precision(detector):
    """The pipeline's own rounding of mitigated embeddings is in what is scored."""
    pipe = make_pipe(StableDiffusionPipeline).to(torch.bfloat16)
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "mitigate")(MEMORIZED[0], num_inference_steps=1, output_type="latent")
    if actions(result) == ["mitigated"]:
        assert calls[0].states.dtype == torch.bfloat16
        assert not detector.score_embeddings(calls[0].states[1:].float().numpy()).memorized.any()
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "flag", first_step=1.0)(CLEAN, num_inference_steps=1, output_type="latent")
    assert [v.norm for v in result.verdicts] == pytest.approx(mean_norms(calls[0].output, 2), rel=1e-5)


def test_is_the_pipeline(pipe, detector):
    """Attributes are the pipeline's, to read and to set; what moves it stays guarded."""
    guarded = guard(pipe, detector)
    assert guarded.unet is pipe.unet and guarded.components == pipe.components
    guarded.scheduler = EulerDiscreteScheduler.from_config(guarded.scheduler.config)
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    assert guarded.to("cpu") is guarded
    assert copying.copy(guarded).unet is pipe.unet
    with pytest.raises(AttributeError, match="nothing"):
        guarded.nothing  # noqa: B018
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    with pytest.raises(InputError, match="its prediction type is 'v_prediction', and not 'epsilon'"):
        guarded("a star")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"action": "refuse"}, "no action='refuse': use 'block', 'mitigate' or 'flag'"),
        ({"action": "mitigate", "first_step": 1.0}, "leave first_step out"),
        *(({"first_step": bad}, "first_step is .*: give a threshold") for bad in (0, -1.0, float("nan"), "3", True)),
        ({"first_step": float("inf")}, "first_step is inf"),
    ],
)
def test_wrong_options(pipe, detector, options, words):
    with pytest.raises(InputError, match=words):
        guard(pipe, detector, **options)


def test_wrong_pipelines(pipe, random_pipe, detector, engine):
    random = Detector.load(engine)
    for wrong, words in [
        ("a pipe", "takes a diffusers pipeline, not str"),
        (guard(pipe, detector), "not GuardedPipeline"),
        (DiffusionPipeline(), "DiffusionPipeline has no UNet"),
        (DDPMPipeline(pipe.unet, pipe.scheduler), "DDPMPipeline has no UNet that prompts guide"),
    ]:
        with pytest.raises(InputError, match=words):
            guard(wrong, detector)
    with pytest.raises(InputError, match="takes a Detector, not PosixPath"):
        guard(pipe, engine)
    with pytest.raises(InputError, match="its width of prompt embeddings is 96, and not 24"):
        guard(pipe, random)
    random_pipe.scheduler = DDIMScheduler.from_config(random_pipe.scheduler.config, prediction_type="epsilon")
    with pytest.raises(InputError, match="is not calibrated for cpu-fp32, so there are no verdicts"):
        guard(random_pipe, random)
    assert actions(guard(random_pipe, random, first_step=1e9)("a star", num_inference_steps=1)) == ["passed"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, InputError, "either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 24, 96)}, InputError, "either prompt or prompt_embeds"),
        ({"prompt": 7}, InputError, "prompt is int"),
        ({"prompt": ["a", None]}, InputError, "Prompt 2 is NoneType"),
        ({"prompt": []}, InputError, "no prompts"),
        ({"prompt": "a", "return_dict": False}, InputError, "leave return_dict=False out"),
        ({"prompt": "a", "size": 7}, TypeError, "size"),
        ({"prompt_embeds": torch.zeros(1, 77, 96)}, InputError, "this engine takes"),
    ],
)
def test_wrong_calls(pipe, detector, arguments, error, words):
    with pytest.raises(error, match=words):
        guard(pipe, detector)(**arguments)


def test_loads_neither_torch_nor_diffusers(tmp_path):
    """Until a pipeline is guarded; and without diffusers that is one sentence."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from memedge.integrations.diffusers import guard; from memedge import Detector\n"
        "assert 'torch' not in sys.modules\n"
        "try: guard(None, None)\nexcept ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "The guard needs 'diffusers', which is not installed: run `python -m pip install 'memedge[export]'`.\n"
    )
