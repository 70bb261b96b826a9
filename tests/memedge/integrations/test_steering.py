"""Steering in real pipelines: what the sampler is given, by its formula and by another pipeline's own guidance."""

import shutil
from contextlib import contextmanager

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from engines import edit_manifest
from guarded import SCHEDULERS, actions, make_pipe, recorded, same, seeded, with_controlnet
from PIL import Image

from memedge import Detector, InputError
from memedge.integrations.diffusers import guard

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
SCALE, UNTIL, OWN = -2.0, 650, 5.0
OPTIONS = {"num_inference_steps": 6, "output_type": "latent", "guidance_scale": OWN}


class Opposite(StableDiffusionPipeline):
    """Guides by SCALE above UNTIL, and by the user's own scale after: diffusers' arithmetic, and no hook."""

    do_classifier_free_guidance = True

    def __call__(self, prompt, *, guidance_scale, **kwargs):
        def scale(timestep):
            return SCALE if timestep > UNTIL else guidance_scale

        def end(_pipe, step, _timestep, _tensors):
            following = self.scheduler.timesteps[step + 1 : step + 2]
            self._guidance_scale = scale(float(following[0])) if len(following) else guidance_scale
            return {}

        return super().__call__(prompt, guidance_scale=SCALE, callback_on_step_end=end, **kwargs)


def opposite(pipe):
    """A pipeline of the same parts that does so."""
    made = Opposite(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def steps(scheduler):
    """Yield a list that the prediction of each step, which the scheduler is given, is added to."""
    given, step = [], scheduler.step

    def noted(prediction, *args, **kwargs):
        given.append(prediction.clone())
        return step(prediction, *args, **kwargs)

    scheduler.step = noted
    try:
        yield given
    finally:
        del scheduler.step


def close(a, b, tolerance=1e-5):
    """Whether tensors are equal but for rounding, relative to the largest value."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def test_is_ddim_by_hand(small):
    """The formula of guidance and that of DDIM; the other image bit by bit the bare pipeline's."""
    pipe, detector, clean, memorized = small
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    prompts = [clean[0], memorized[0]]
    bare = pipe(prompts, generator=seeded(), **OPTIONS).images
    result = guard(pipe, detector, "steer")(prompts, generator=seeded(), **OPTIONS)
    assert actions(result) == ["passed", "steered"]
    assert same(result.images[0], bare[0]) and not close(result.images[1], bare[1], 0.01)

    latent = torch.randn(2, 4, 8, 8, generator=seeded())[1:]
    times, alphas, last = (
        getattr(pipe.scheduler, name) for name in ("timesteps", "alphas_cumprod", "final_alpha_cumprod")
    )
    assert [t > UNTIL for t in times] == [True, True, False, False, False, False]
    with torch.no_grad():
        states, empty = pipe.encode_prompt(memorized[0], "cpu", 1, True)
        for t, alpha, after in zip(times, alphas[times], [*alphas[times[1:]], last], strict=True):
            cond, uncond = (pipe.unet(latent, t, encoder_hidden_states=e).sample for e in (states, empty))
            noise = uncond + (SCALE if t > UNTIL else OWN) * (cond - uncond)
            clear = (latent - (1 - alpha).sqrt() * noise) / alpha.sqrt()
            latent = after.sqrt() * clear + (1 - after).sqrt() * noise
    assert close(result.images[1], latent[0], 1e-4)
    assert result.verdicts[1].reason.endswith("; steered: guidance -2, not 5, above timestep 650, in 2 of 6 steps")


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_any_scheduler(small, kind):
    """As a pipeline whose own guidance is opposite first, also where a scheduler keeps predictions of earlier steps."""
    pipe, detector, clean, memorized = small
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    prompts, options = [clean[0], memorized[0], clean[1]], OPTIONS | {"num_images_per_prompt": 2}
    bare = pipe(prompts, generator=seeded(), **options).images
    other = opposite(pipe)(prompts, generator=seeded(), **options).images
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "steer")(prompts, generator=seeded(), **options)
    assert actions(result) == ["passed", "steered", "passed"]
    assert all(same(result.images[place], bare[place]) for place in (0, 1, 4, 5))
    assert all(close(result.images[place], other[place], 1e-4) for place in (2, 3))
    assert {len(call.output) for call in calls} == {12}  # no call beside the sampler's


def test_nothing_to_steer(small):
    """Bit by bit the bare pipeline's, before generation and by the first step."""
    pipe, detector, clean, _ = small
    options = OPTIONS | {"negative_prompt": ["red", ""], "num_inference_steps": 2}
    bare = pipe(clean, generator=seeded(), **options).images
    for guarded in (guard(pipe, detector, "steer"), guard(pipe, detector, "steer", first_step=1e9)):
        result = guarded(clean, generator=seeded(), **options)
        assert actions(result) == ["passed", "passed"] and all(map(same, result.images, bare))


def test_by_the_first_step(small):
    """The norm is known within the first call, from which on those over it are steered: as by verdicts beforehand."""
    pipe, detector, clean, memorized = small
    prompts = [memorized[0], clean[0]]
    expected = guard(pipe, detector, "steer")(prompts, generator=seeded(), **OPTIONS)
    flagged = guard(pipe, detector, "flag", first_step=1.0)(prompts, generator=seeded(), **OPTIONS)
    norms = [verdict.norm for verdict in flagged.verdicts]
    guarded = guard(pipe, detector, "steer", first_step=sum(norms) / 2)
    result = guarded(prompts, generator=seeded(), **OPTIONS)
    assert norms[0] > norms[1] and [verdict.norm for verdict in result.verdicts] == norms
    assert actions(result) == actions(expected) == ["steered", "passed"]
    assert all(map(same, result.images, expected.images))
    assert "in 2 of 6 steps" in result.verdicts[0].reason and "steered" not in result.verdicts[1].reason
    assert repr(guarded).endswith("memorized prompts are steered>")


def test_negative_prompt(small):
    """What is opposed is the empty prompt's prediction, by a call more for flagged rows; after, the usual."""
    pipe, detector, clean, memorized = small
    prompts, negative = [clean[0], memorized[0]], ["red", "a moon on skis"]
    bare = pipe(prompts, negative_prompt=negative, generator=seeded(), **OPTIONS).images
    with recorded(pipe.unet) as calls, steps(pipe.scheduler) as given:
        result = guard(pipe, detector, "steer")(prompts, negative_prompt=negative, generator=seeded(), **OPTIONS)
    assert actions(result) == ["passed", "steered"] and same(result.images[0], bare[0])
    assert [len(call.output) for call in calls] == [4, 1, 4, 1, 4, 4, 4, 4]
    with torch.no_grad():
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
    assert torch.equal(calls[1].states, empty)
    assert_steered(calls, given, row=1)


def assert_steered(calls, given, row):
    """Each step was given the formula's prediction; the calls of one row are of ε_0."""
    sampler = [call for call in calls if len(call.output) > 1]
    uncond = [call.output[0] for call in calls if len(call.output) == 1]
    assert len(sampler) == len(given)
    for step, (call, prediction) in enumerate(zip(sampler, given, strict=True)):
        own, cond = (half[row] for half in call.output.chunk(2))
        expected = own + OWN * (cond - own)
        if call.timestep > UNTIL:
            expected = uncond[step] + SCALE * (cond - uncond[step])
        assert close(prediction[row], expected), step


def test_guidance_rescale(small):
    """It takes the standard deviation of what ε_c was replaced by; the picture stays as large as it was."""
    pipe, detector, _, memorized = small
    options = OPTIONS | {"guidance_rescale": 0.7}
    bare = pipe(memorized[0], generator=seeded(), **options).images
    with recorded(pipe.unet) as calls, steps(pipe.scheduler) as given:
        result = guard(pipe, detector, "steer")(memorized[0], generator=seeded(), **options)
    for call, prediction in zip(calls, given, strict=True):
        uncond, cond = call.output.chunk(2)
        if call.timestep > UNTIL:
            cond = uncond + SCALE / OWN * (cond - uncond)
        assert close(prediction, rescale_noise_cfg(uncond + OWN * (cond - uncond), cond, 0.7))
    assert result.images[0].isfinite().all()
    assert 0.5 < float(result.images[0].std() / bare.std()) < 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_v_prediction_and_half_precision(copy, checkpoint, dtype):
    """The arithmetic is linear, so that it is the same of v; rounding is no more than the pipeline's own."""
    edit_manifest(copy, lambda m: m.update(prediction_type="v_prediction"))
    pipe = make_pipe(StableDiffusionPipeline, checkpoint).to(dtype)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    other = opposite(pipe)("a star", generator=seeded(), **OPTIONS).images
    result = guard(pipe, Detector.load(copy), "steer", first_step=1e-3)("a star", generator=seeded(), **OPTIONS)
    assert actions(result) == ["steered"]
    assert close(result.images[0].float(), other[0].float(), 1e-4 if dtype == torch.float32 else 0.1)


def test_a_run_from_a_picture(small):
    """Steered while it is noisy enough; one that starts too late for that is blocked, and ends if all are."""
    pipe, detector, clean, memorized = small
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    guarded, prompts = guard(other, detector, "steer"), [clean[0], memorized[0]]
    options = OPTIONS | {"image": [Image.new("RGB", (32, 32), "red")] * 2}
    for strength, action, words in [
        (0.9, "steered", "; steered: guidance -2, not 5, above timestep 650, in 1 of 5 steps"),
        (0.5, "blocked", "; not steered: timestep 333 is the first that could be, and nothing is at 650 or below"),
    ]:
        bare = other(prompts, generator=seeded(), strength=strength, **options).images
        result = guarded(prompts, generator=seeded(), strength=strength, **options)
        assert actions(result) == ["passed", action] and same(result.images[0], bare[0])
        assert (result.images[1] is None) == (action == "blocked")
        assert result.verdicts[1].reason.endswith(words)
    with recorded(pipe.unet) as calls:
        result = guarded(memorized, generator=seeded(), strength=0.5, **options)
    assert len(calls) == 1 and result.output is None and actions(result) == ["blocked", "blocked"]


def test_the_scale_of_the_moment(small):
    """A callback that changes the pipeline's guidance under way changes nothing of what is steered."""
    pipe, detector, _, memorized = small

    def end(own, *_):
        own._guidance_scale = 9.0
        return {}

    with recorded(pipe.unet) as calls, steps(pipe.scheduler) as given:
        guard(pipe, detector, "steer")(memorized[0], callback_on_step_end=end, **OPTIONS)
    uncond, cond = calls[1].output.chunk(2)
    assert close(given[1], uncond + SCALE * (cond - uncond))
    uncond, cond = calls[2].output.chunk(2)
    assert close(given[2], uncond + 9 * (cond - uncond))


def test_no_guidance_to_steer(small, tmp_path):
    pipe, detector, clean, _ = small
    guarded = guard(pipe, detector, "steer")
    with pytest.raises(InputError, match="guidance_scale is 1, so there is no guidance, which action='steer' needs"):
        guarded(clean[0], guidance_scale=1)

    class Unguided(StableDiffusionPipeline):
        do_classifier_free_guidance = False

    with pytest.raises(InputError, match="Unguided decides itself when to guide, and action='steer' needs"):
        guard(Unguided(**pipe.components, requires_safety_checker=False), detector, "steer")
    distilled = make_distilled(pipe)
    with pytest.raises(InputError, match="its input for the guidance scale is True, and not False"):
        guard(distilled, detector)
    copy = shutil.copytree(detector.info.path, tmp_path / "engine")
    edit_manifest(copy, lambda m: m.update(guidance=7.5))
    detector = Detector.load(copy)
    for options in ({"action": "steer"}, {"first_step": 1.0}):
        with pytest.raises(InputError, match="The UNet takes the guidance scale as an input"):
            guard(distilled, detector, **options)


def make_distilled(pipe):
    """A pipeline whose UNet is as that of an LCM."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=8)
    return StableDiffusionPipeline(**pipe.components | {"unet": unet}, requires_safety_checker=False)


@pytest.mark.slow
def test_sdxl(sdxl):
    """Sizes and pooled embeddings of the flagged rows go with them."""
    pipe, detector, clean, memorized = sdxl
    prompts, options = [clean[0], memorized[0]], OPTIONS | {"negative_prompt": "red", "num_inference_steps": 3}
    bare = pipe(prompts, generator=seeded(), **options).images
    with recorded(pipe.unet) as calls, steps(pipe.scheduler) as given:
        result = guard(pipe, detector, "steer")(prompts, generator=seeded(), **options)
    assert actions(result) == ["passed", "steered"] and same(result.images[0], bare[0])
    assert sum(len(call.output) == 1 for call in calls) == 1
    assert_steered(calls, given, row=1)


def test_beside_a_controlnet(small):
    """The prompt alone is judged; what is guided beside it stays so, bit by bit, but for the image that is steered."""
    bare_pipe, detector, clean, memorized = small
    pipe = with_controlnet(bare_pipe)
    prompts, pictures = [clean[0], memorized[0]], [Image.new("RGB", (8, 8), colour) for colour in ("red", "navy")]
    bare = pipe(prompts, pictures, generator=seeded(), **OPTIONS).images
    plain = bare_pipe(prompts, generator=seeded(), **OPTIONS).images
    assert not close(bare[0], plain[0], 0.01)
    for action, done in (("flag", "flagged"), ("steer", "steered"), ("block", "blocked")):
        result = guard(pipe, detector, action)(prompts, pictures, generator=seeded(), **OPTIONS)
        assert actions(result) == ["passed", done]
        assert same(result.images[0], bare[0])
    steered = guard(pipe, detector, "steer")
    with pytest.raises(InputError, match="ControlNet reads the negative prompt too"):
        steered(prompts, pictures, negative_prompt=["blurry"] * 2, generator=seeded(), **OPTIONS)
    with pytest.raises(InputError, match="generates from a picture"):
        guard(pipe, detector, first_step=1.0)
