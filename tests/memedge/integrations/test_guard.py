"""The guard around real diffusers pipelines: the same pictures, or none; its verdicts; its hook; every mistake."""

import copy as copying
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from engines import edit_manifest
from guarded import SCHEDULERS, Model, actions, make_pipe, mean_norms, recorded, same, seeded
from PIL import Image

from memedge import Detector, InputError
from memedge.engine.errors import NotFiniteError
from memedge.integrations.diffusers import GuardedOutput, GuardVerdict, guard
from memedge.integrations.guarded import mitigated
from memedge.mitigation.mitigator import Mitigation
from memedge.results import Scores

MEMORIZED = ["the burrito sign", "the left luggage sign"]
CLEAN = ["cute ship", "a briefcase"]
# diffusers 0.42.1 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def emoji(detector):
    """The embedded model, which has truly memorized pictures."""
    pipe = make_pipe(StableDiffusionPipeline)
    if int(transformers.__version__.split(".")[0]) < 5:
        # Such a pipeline may read the checkpoint's files otherwise, and then brings no memorized picture back.
        with torch.no_grad():
            read = pipe.encode_prompt(MEMORIZED[0], "cpu", 1, False)[0].numpy()
        if detector.score_embeddings(read).score[0] != pytest.approx(detector.score(MEMORIZED[:1]).score[0], rel=1e-3):
            pytest.skip("this transformers reads the embedded checkpoint otherwise than the one it was made with")
    return Model(pipe, detector, CLEAN, MEMORIZED)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_others_are_the_bare_pipelines(small, kind):
    """In a mixed batch too, bit by bit, with schedulers that draw noise at each step too."""
    pipe, detector, clean, memorized = small
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts = [clean[0], memorized[0], clean[1]]
    options = {"num_inference_steps": 4, "num_images_per_prompt": 2, "output_type": "np"}
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
def test_nothing_blocked(small, output_type):
    pipe, detector, clean, _ = small
    options = {"num_inference_steps": 2, "output_type": output_type, "negative_prompt": ["red", ""]}
    generators = [seeded(i) for i in range(4)]
    bare = pipe(clean, generator=generators, num_images_per_prompt=2, **options)
    generators = [seeded(i) for i in range(4)]
    result = guard(pipe, detector)(clean, generator=generators, num_images_per_prompt=2, **options)
    assert actions(result) == ["passed", "passed"]
    assert len(result.images) == 4
    assert all(map(same, result.images, bare.images))
    assert type(result.output) is type(bare) and type(result.output.images) is type(bare.images)
    assert not any(map(same, result.images, result.images[1:]))
    if output_type == "pil":
        assert all(isinstance(image, Image.Image) for image in result.images)


def test_all_blocked(small):
    """Nothing is generated; each verdict is the detector's."""
    pipe, detector, _, memorized = small
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "block")(memorized, num_images_per_prompt=3)
    assert calls == []
    assert result.images == [None] * 6 and result.output is None
    for own, verdict in zip(result.verdicts, detector.detect(memorized), strict=True):
        assert (own.prompt, own.score, own.norm) == (verdict.prompt, verdict.score, verdict.norm)
        assert (own.action, own.threshold) == ("blocked", verdict.threshold)
        assert own.reason == f"{verdict.reason}; the pipeline has 1 hook on the UNet"  # this test's
        assert own.mitigation is None
    single = guard(pipe, detector)(memorized[0], num_inference_steps=2)
    assert single.images == [None] and actions(single) == ["blocked"]


def test_flag(small):
    """Flagged ones are generated as asked for."""
    pipe, detector, clean, memorized = small
    prompts = [memorized[0], clean[0]]
    bare = pipe(prompts, num_inference_steps=2, generator=seeded(), guidance_scale=1, output_type="np").images
    result = guard(pipe, detector, "flag")(
        prompts, num_inference_steps=2, generator=seeded(), guidance_scale=1, output_type="np"
    )
    assert actions(result) == ["flagged", "passed"]
    assert all(map(same, result.images, bare))


def test_callbacks_and_rescaling(small):
    """What a call does at each step stays as it is."""
    pipe, detector, clean, _ = small
    seen = []

    def end(_pipe, step, _timestep, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] * 0.9}

    options = {"num_inference_steps": 3, "guidance_rescale": 0.7, "callback_on_step_end": end, "output_type": "latent"}
    bare = pipe(clean, 8, 8, generator=seeded(), **options).images
    result = guard(pipe, detector)(clean, 8, 8, generator=seeded(), **options)
    assert seen == [0, 1, 2] * 2
    assert all(map(same, result.images, bare))


def test_given_latents(small):
    pipe, detector, clean, memorized = small
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    options = {"latents": latents, "num_inference_steps": 2, "output_type": "latent"}
    bare = pipe([clean[0], memorized[0]], **options).images
    result = guard(pipe, detector)([clean[0], memorized[0]], **options)
    assert same(result.images[0], bare[0]) and result.images[1] is None


def test_embeddings(small):
    """Embeddings are scored as such; the blocked one is replaced by the other."""
    pipe, detector, clean, memorized = small
    prompts = [memorized[0], clean[0]]
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


def test_learnt_words(small, checkpoint):
    """What textual inversion adds, the engine's tokenizer does not know: the pipeline's own embeddings are scored."""
    pipe, prompt = make_pipe(StableDiffusionPipeline, checkpoint), small.memorized[0]
    with torch.no_grad():
        first = pipe.tokenizer(prompt).input_ids[1]  # a character, with this tokenizer
        concept = pipe.text_encoder.get_input_embeddings().weight[first].clone()
    pipe.load_textual_inversion(concept[None], token="<learnt>")
    learnt = f"<learnt>{prompt[1:]}"
    result = guard(pipe, small.detector)(learnt, num_inference_steps=2)
    plain = small.detector.score([prompt, learnt])
    assert actions(result) == ["blocked"] and result.verdicts[0].prompt == learnt
    assert result.verdicts[0].score == pytest.approx(plain.score[0], rel=1e-4)
    assert plain.score[1] != pytest.approx(plain.score[0], rel=1e-3)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_first_step_is_the_norm(small, kind):
    """By torch, from the UNet's own first output; the pictures are the bare pipeline's, with no call added."""
    pipe, detector, clean, memorized = small
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts = [clean[0], memorized[0]]
    options = {"num_inference_steps": 5, "num_images_per_prompt": 2, "output_type": "np"}
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


def test_first_step_ends_the_run(small):
    """After one call, if all are over the threshold; not to flag them; and the threshold itself is over it."""
    pipe, detector, _, memorized = small
    with recorded(pipe.unet) as calls:
        bare = pipe(memorized, num_inference_steps=4, generator=seeded(), output_type="np").images
        norms = mean_norms(calls[0].output, 2)
        del calls[:]
        options = {"num_inference_steps": 4, "output_type": "np"}
        result = guard(pipe, detector, first_step=min(norms) * (1 - 1e-6))(memorized, generator=seeded(), **options)
        assert len(calls) == 1
        assert result.images == [None, None] and result.output is None and actions(result) == ["blocked"] * 2
        exact = guard(pipe, detector, first_step=min(v.norm for v in result.verdicts))
        assert actions(exact(memorized, generator=seeded(), **options)) == ["blocked"] * 2
        flagged = guard(pipe, detector, "flag", first_step=min(norms) * (1 - 1e-6))
        result = flagged(memorized, generator=seeded(), **options)
    assert actions(result) == ["flagged"] * 2 and all(map(same, result.images, bare))
    again = pipe(memorized, num_inference_steps=4, generator=seeded(), output_type="np").images
    assert all(map(same, again, bare))  # an ended run leaves nothing behind


def test_first_step_of_embeddings(small):
    pipe, detector, _, memorized = small
    with torch.no_grad():
        states, uncond = pipe.encode_prompt(memorized, "cpu", 1, True)
    result = guard(pipe, detector, first_step=0.1)(
        prompt_embeds=states, negative_prompt_embeds=uncond, num_inference_steps=2
    )
    assert result.images == [None, None] and [v.prompt for v in result.verdicts] == [None, None]
    # Of longer prompts than the engine reads: what `guard` says of these without first_step.
    long, empty = torch.cat([states, states], 1), torch.cat([uncond, uncond], 1)
    result = guard(pipe, detector, first_step=0.1)(
        prompt_embeds=long, negative_prompt_embeds=empty, num_inference_steps=2
    )
    assert actions(result) == ["blocked"] * 2


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("karras", [False, True])
def test_first_step_of_v_prediction(small, copy, kind, karras):
    """Scaled to ε by ᾱ of the scheduler's own first σ, also between two trained timesteps."""
    edit_manifest(copy, lambda m: m.update(prediction_type="v_prediction"))
    options = {"use_karras_sigmas": True} if karras and kind is not DDIMScheduler else {}
    small.pipe.scheduler = kind.from_config(small.pipe.scheduler.config, prediction_type="v_prediction", **options)
    with recorded(small.pipe.unet) as calls:
        result = guard(small.pipe, Detector.load(copy), "flag", first_step=1.0)(
            ["a star", "moon"], num_inference_steps=3, output_type="latent"
        )
    if kind is DDIMScheduler:
        alpha = float(small.pipe.scheduler.alphas_cumprod[int(calls[0].timestep)])
    else:
        sigma = float(small.pipe.scheduler.sigmas[0])
        alpha = 1 / (1 + sigma**2)
    expected = np.array(mean_norms(calls[0].output, 2)) * alpha**0.5 / (1 - alpha)
    assert [v.norm for v in result.verdicts] == pytest.approx(expected, rel=1e-3)


def test_no_signal_at_the_first_step(small, copy):
    edit_manifest(copy, lambda m: m.update(prediction_type="v_prediction"))
    small.pipe.scheduler = DDIMScheduler.from_config(
        small.pipe.scheduler.config,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    with pytest.raises(InputError, match="zero terminal SNR"):
        guard(small.pipe, Detector.load(copy), first_step=1.0)("a star", num_inference_steps=2)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_hook_is_removed_after_errors(small, error):
    pipe, detector = small[:2]

    def end(*_):
        assert len(pipe.unet._forward_hooks) == 1
        raise error

    with pytest.raises(error):
        guard(pipe, detector, first_step=1e9)("a star", num_inference_steps=2, callback_on_step_end=end)
    assert not pipe.unet._forward_hooks
    with pytest.raises(TypeError, match="should be the same type to `prompt`"):
        guard(pipe, detector, first_step=1e9)("a star", negative_prompt=["a", "b"])
    assert not pipe.unet._forward_hooks
    latents = torch.full((1, 4, 8, 8), torch.nan)
    with pytest.raises(NotFiniteError):
        guard(pipe, detector, first_step=1e9)("a star", latents=latents, num_inference_steps=2)


def test_first_step_without_its_halves(small):
    pipe, detector = small[:2]
    guarded = guard(pipe, detector, first_step=1.0)
    for scale in (1, 0.0):
        with pytest.raises(InputError, match=f"guidance_scale is {scale}, so there is no guidance"):
            guarded("a star", guidance_scale=scale)

    class Unguided(StableDiffusionPipeline):
        do_classifier_free_guidance = False

    with pytest.raises(InputError, match="Unguided decides itself when to guide"):
        guard(Unguided(**pipe.components, requires_safety_checker=False), detector, first_step=1.0)


def test_threads_that_share_a_unet(small):
    """A guard sees its own thread's call, and not what another calls the same UNet with in the meantime."""
    pipe, detector, clean, _ = small
    other = pipe.__class__(**(pipe.components | {"scheduler": copying.deepcopy(pipe.scheduler)}))
    inside = []

    def encode(*args, **kwargs):
        """Before its first call, let another thread run all of its own."""
        thread = threading.Thread(
            target=lambda: inside.extend(other([*clean, "a star"], num_inference_steps=2, output_type="latent").images)
        )
        thread.start()
        thread.join()
        return type(pipe).encode_prompt(pipe, *args, **kwargs)

    expected = guard(pipe, detector, "flag", first_step=1.0)(clean[0], generator=seeded(), num_inference_steps=2)
    pipe.encode_prompt = encode
    try:
        result = guard(pipe, detector, "flag", first_step=1.0)(clean[0], generator=seeded(), num_inference_steps=2)
    finally:
        del pipe.encode_prompt
    assert len(inside) == 3
    assert result.verdicts == expected.verdicts


@pytest.mark.slow
def test_compiled_unet(small):
    """By torch.compile it is measured as any; compiled in place, or called past its hooks, it is not: an error."""
    pipe, detector, clean, _ = small
    options = {"num_inference_steps": 1, "output_type": "latent"}
    plain = pipe.unet
    expected = guard(pipe, detector, "flag", first_step=1.0)(clean, generator=seeded(), **options)
    guarded = guard(pipe, detector, "flag", first_step=1.0)
    try:
        pipe.unet = torch.compile(plain, backend="eager")
        result = guarded(clean, generator=seeded(), **options)
        pipe.unet = copying.deepcopy(plain)
        pipe.unet.compile(backend="eager")
        with pytest.raises(InputError, match="is compiled in place"):
            guarded(clean, **options)
        pipe.unet = Wrapped(plain)
        with pytest.raises(InputError, match="The UNet's calls are Wrapped's own"):
            guarded(clean, **options)
    finally:
        pipe.unet = plain
    assert [v.norm for v in result.verdicts] == pytest.approx([v.norm for v in expected.verdicts], rel=1e-4)


class Wrapped(torch.nn.Module):
    """Calls another module's forward, past all hooks."""

    def __init__(self, inner: torch.nn.Module):
        super().__init__()
        self.inner, self.config, self.dtype, self.device = inner, inner.config, inner.dtype, inner.device

    def __call__(self, *args, **kwargs):
        return self.inner.forward(*args, **kwargs)


@pytest.mark.slow
def test_sdxl(sdxl):
    """Scored as text, as embeddings with pooled ones, and with a second prompt; in a batch with a blocked one."""
    pipe, detector, clean, memorized = sdxl
    options = {"num_inference_steps": 2, "output_type": "np"}
    mixed = [memorized[1], clean[0]]
    bare = pipe(mixed, generator=seeded(), **options).images
    result = guard(pipe, detector)(mixed, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"]
    assert result.images[0] is None and same(result.images[1], bare[1])
    every = clean + memorized
    assert actions(guard(pipe, detector)(every, prompt_2=every, **options)) == ["passed"] * 2 + ["blocked"] * 2

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

    # A layer that is left out is not in the engine's.
    result = guard(pipe, detector, "flag")(mixed, clip_skip=1, **options)
    with torch.no_grad():
        states, _, pooled, _ = pipe.encode_prompt(mixed, device="cpu", num_images_per_prompt=1, clip_skip=1)
    expected = detector.score_embeddings(states.numpy(), pooled.numpy())
    assert [v.score for v in result.verdicts] == expected.score.tolist()
    assert [v.prompt for v in result.verdicts] == mixed

    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, first_step=1e9)(mixed, generator=seeded(), num_images_per_prompt=2, **options)
    assert [v.norm for v in result.verdicts] == pytest.approx(mean_norms(calls[0].output, 2), rel=1e-5)


def test_pictures_to_pictures(small):
    """Prompts are scored there as anywhere; the first step, which does not start from noise, is not measured."""
    pipe, detector, clean, memorized = small
    parts = pipe.components | {"requires_safety_checker": False}
    picture = Image.new("RGB", (32, 32), "red")
    prompts = [clean[0], memorized[0]]
    options = {"image": [picture] * 2, "num_inference_steps": 4, "output_type": "latent"}
    for kind, more in [
        (StableDiffusionImg2ImgPipeline, {}),
        (StableDiffusionInpaintPipeline, {"mask_image": picture.convert("L"), "height": 32, "width": 32}),
    ]:
        other = kind(**parts)
        other.set_progress_bar_config(disable=True)
        bare = other(prompts, generator=seeded(), **options, **more).images
        result = guard(other, detector)(prompts, generator=seeded(), **options, **more)
        assert actions(result) == ["passed", "blocked"]
        assert same(result.images[0], bare[0]) and result.images[1] is None
        with pytest.raises(InputError, match="generates from a picture, not from noise"):
            guard(other, detector, first_step=1.0)


def test_mitigate(emoji):
    """Generated from embeddings that score under the threshold; clean ones, bit by bit, from their own."""
    pipe, detector, clean, memorized = emoji
    prompts = [clean[0], memorized[0], memorized[0]]
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
    assert actions(guard(pipe, detector, "mitigate")(clean[0], num_inference_steps=1)) == ["passed"]


def test_a_mitigated_verdict_has_one_threshold(caplog):
    """The guard's own, though the mitigator ran on another provider, whose threshold is another."""
    states = np.zeros((4, 8), np.float32)
    loss = {"loss": "score", "target": 1.0, "before": 4.0, "after": 0.9, "iterations": 3, "distance": 0.1}
    made = {"score": 0.9, "threshold": 3.4433, "memorized": False, "succeeded": True, "truncated": False}
    result = Mitigation("a", states, None, **loss, **made, passes=2, backward_passes=2, reason="because")
    scores = Scores(np.ones(1), np.zeros(1), np.array([0.95]), np.array([False]), np.zeros(1, bool), 3.4414)
    before = GuardVerdict("a", "blocked", 4.01, 2.0, 3.4414, "score 4.01 ≥ threshold 3.441")
    with caplog.at_level("INFO", logger="memedge"):
        verdict = mitigated(before, result, scores, 0)
        GuardedOutput.assemble(None, [before], [False])
    assert verdict.threshold == verdict.mitigation.threshold == 3.4414
    assert (verdict.mitigation.score, verdict.mitigation.memorized) == (0.95, False)
    assert (verdict.mitigation.before, verdict.mitigation.after) == (4.0, 0.9)
    assert "array" not in repr(verdict)
    assert caplog.messages == ["guard: blocked: score 4.01 ≥ threshold 3.441"]


def test_an_operating_point(small):
    """Another threshold than the engine's, for this guard alone, and said by each verdict."""
    pipe, detector, clean = small.pipe, small.detector, small.clean
    guarded = guard(pipe, detector, threshold=-1e9)
    result = guarded(clean[0], num_inference_steps=1)
    assert result.verdicts[0].action == "blocked"
    assert result.verdicts[0].reason.endswith("as given") or "whatever the rest" in result.verdicts[0].reason
    assert repr(guarded).startswith("<StableDiffusionPipeline guarded by <Detector on ")
    assert repr(guarded).endswith("as given>, memorized prompts are blocked>")
    assert detector.info.rule.operating_point == "calibrated"
    with pytest.raises(InputError, match="first_step is a threshold itself, of the norm"):
        guard(pipe, detector, first_step=1.0, threshold=2.0)


def test_mitigation_that_fails(small, monkeypatch):
    """Not under the threshold, or not for the caller's own detector, or of no text: none of it passes."""
    pipe, detector, clean, memorized = small
    guarded = guard(pipe, detector, "mitigate")
    mitigator, embedding = type(guarded._mitigator), guarded._mitigator.embedding
    prompts, options = [memorized[0], clean[0]], {"num_inference_steps": 1, "output_type": "latent"}
    bare = pipe(prompts, generator=seeded(), **options).images

    monkeypatch.setattr(mitigator, "embedding", lambda _, prompt: embedding(prompt, steps=1, learning_rate=1e-6))
    result = guarded(prompts, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"] and result.images[0] is None and same(result.images[1], bare[1])
    assert "; not mitigated: score" in result.verdicts[0].reason and not result.verdicts[0].mitigation.succeeded
    assert guarded(memorized[0], **options).output is None

    unmoved = replace(embedding(memorized[0], steps=1, learning_rate=1e-6), succeeded=True)
    monkeypatch.setattr(mitigator, "embedding", lambda *_: unmoved)
    result = guarded(prompts, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"] and result.images[0] is None and same(result.images[1], bare[1])
    assert "mitigated, but still score" in result.verdicts[0].reason

    with torch.no_grad():
        states, uncond = pipe.encode_prompt(prompts, "cpu", 1, True)
    result = guarded(prompt_embeds=states, negative_prompt_embeds=uncond, generator=seeded(), **options)
    assert actions(result) == ["blocked", "passed"] and same(result.images[1], bare[1])
    assert "only text that the engine's own text encoder reads can be mitigated" in result.verdicts[0].reason


@pytest.mark.slow
def test_mitigate_sdxl(sdxl):
    """The pooled embeddings take part."""
    pipe, detector, clean, memorized = sdxl
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "mitigate")(
            [memorized[0], clean[0]], num_inference_steps=1, output_type="latent"
        )
    assert actions(result) == ["mitigated", "passed"]
    mitigation = result.verdicts[0].mitigation
    np.testing.assert_array_equal(calls[0].states[2].numpy(), mitigation.states)
    assert not detector.score_embeddings(mitigation.states[None], mitigation.pooled[None]).memorized.any()


def test_half_precision(emoji):
    """Mitigated embeddings are scored as the pipeline has rounded them."""
    detector, clean, memorized = emoji[1:]
    pipe = make_pipe(StableDiffusionPipeline).to(torch.bfloat16)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "mitigate")(memorized[0], **options)
    states, exact = calls[0].states[1:], result.verdicts[0].mitigation.states
    assert actions(result) == ["mitigated"] and states.dtype == torch.bfloat16
    rounded = detector.score_embeddings(states.float().numpy()).score[0]
    assert rounded != detector.score_embeddings(exact[None]).score[0]
    assert f"mitigated: score {rounded:.4g} <" in result.verdicts[0].reason
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "flag", first_step=1.0)(clean, **options)
    assert [v.norm for v in result.verdicts] == pytest.approx(mean_norms(calls[0].output, 2), rel=1e-5)


def test_is_the_pipeline(small):
    """Attributes are the pipeline's, to read and to set; what moves it stays guarded."""
    pipe, detector = small[:2]
    guarded = guard(pipe, detector)
    assert guarded.unet is pipe.unet and guarded.vae_scale_factor == pipe.vae_scale_factor
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
        ({"action": "refuse"}, "no action='refuse': use 'block', 'steer', 'mitigate', 'flag' or 'reseed'"),
        ({"action": "mitigate", "first_step": 1.0}, "leave first_step out"),
        *(({"first_step": bad}, "first_step is .*: give a threshold") for bad in (0, -1.0, float("nan"), "3", True)),
        ({"first_step": float("inf")}, "first_step is inf"),
    ],
)
def test_wrong_options(small, options, words):
    pipe, detector = small[:2]
    with pytest.raises(InputError, match=words):
        guard(pipe, detector, **options)


def test_wrong_pipelines(small, emoji, engine):
    pipe, detector = small[:2]
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
    with pytest.raises(InputError, match="of the engine's model, emoji: its width of prompt embeddings is 24, and not"):
        guard(pipe, emoji.detector)
    uncalibrated = Detector.load(engine)
    with pytest.raises(InputError, match="is not calibrated for cpu-fp32, so there are no verdicts"):
        guard(pipe, uncalibrated)
    result = guard(pipe, uncalibrated, first_step=1e9)("a star", num_inference_steps=1, output_type="latent")
    assert actions(result) == ["passed"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, InputError, "either prompt or prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 16, 24)}, InputError, "either prompt or prompt_embeds"),
        ({"prompt": 7}, InputError, "prompt is int"),
        ({"prompt": ["a", None]}, InputError, "Prompt 2 is NoneType"),
        ({"prompt": []}, InputError, "no prompts"),
        ({"prompt": "a", "return_dict": False}, InputError, "leave return_dict=False out"),
        ({"prompt_embeds": [[0.0]]}, InputError, "prompt_embeds is list: give a torch tensor"),
        ({"prompt_embeds": torch.zeros(1, 77, 24)}, InputError, "or guard a pipeline with first_step, which takes"),
    ],
)
def test_wrong_calls(small, arguments, error, words):
    pipe, detector = small[:2]
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
