"""A guard that watches the run: each image is judged for itself, and nothing else is touched."""

from typing import Any

import msgspec
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from engines import edit_manifest
from guarded import actions, make_pipe, recorded, same, seeded, with_controlnet
from PIL import Image

from memedge import Detector, InputError, MonitorCalibration
from memedge.engine.manifest import Estimate
from memedge.integrations.diffusers import guard
from memedge.monitor.calibration import GenerationSettings

STEPS, SCALE = 4, 5.0
OPTIONS: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "output_type": "latent"}
SETTINGS = GenerationSettings("StableDiffusionPipeline", "DDIMScheduler", STEPS, SCALE)
TIMES = (751.0, 501.0, 251.0, 1.0)
# diffusers 0.42.1 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def calibration(cut: float, mean: tuple[float, ...] = (0.0,) * STEPS, **more: Any) -> MonitorCalibration:
    """One by which an image is memorized where log ‖Δ‖ − mean reaches the cut at any of the steps."""
    made = {
        "settings": SETTINGS,
        "timesteps": TIMES,
        "statistic": "norm",
        "looks": len(mean),
        "mean": mean,
        "deviation": (1.0,) * len(mean),
        "cut": cut,
        "target_fpr": 0.01,
        "clean": 99,
        "memorized": 9,
        "found": Estimate(0.9, 0.8, 1.0),
        "false_alarms": Estimate(0.01, 0.0, 0.1),
    }
    return MonitorCalibration(**made | more)


@pytest.fixture
def watched(small):
    """A pipeline, its detector, two prompts, the bare images of two each, and what the monitor sees of each."""
    pipe, detector, clean, memorized = small
    pipe.scheduler.register_to_config(steps_offset=1)
    prompts = [clean[0], memorized[0]]
    options = OPTIONS | {"num_images_per_prompt": 2}
    bare = pipe(prompts, generator=seeded(), **options).images
    seen = guard(pipe, detector, "flag", monitor=calibration(1e9))(prompts, generator=seeded(), **options)
    assert actions(seen) == ["passed", "passed"] and all(map(same, seen.images, bare))
    values = [image.value for verdict in seen.verdicts for image in verdict.images]
    return pipe, detector, prompts, options, bare, values


def test_the_embedded_engine_has_a_calibration():
    pipe = make_pipe(StableDiffusionPipeline)
    guarded = guard(pipe, Detector.load(provider="cpu", threads=1), monitor=True)
    prompts = ["the left luggage sign", "a briefcase"]
    result = guarded(prompts, num_inference_steps=20, guidance_scale=4.0, generator=seeded(), output_type="latent")
    assert actions(result) == ["blocked", "passed"]
    assert result.images[0] is None and result.images[1] is not None
    assert result.verdicts[0].images[0].step <= 4


def middle(values: list[float], over: int) -> float:
    """A cut that `over` of the values reach."""
    ordered = sorted(values, reverse=True)
    return (ordered[over - 1] + ordered[over]) / 2


def test_each_image_is_withheld_for_itself(watched):
    pipe, detector, prompts, options, bare, values = watched
    cut = middle(values, 1)
    worst = values.index(max(values))
    result = guard(pipe, detector, monitor=calibration(cut))(prompts, generator=seeded(), **options)
    assert [image is None for image in result.images] == [place == worst for place in range(4)]
    assert all(same(image, own) for image, own in zip(result.images, bare, strict=True) if image is not None)
    verdict = result.verdicts[worst // 2]
    assert actions(result) == ["blocked" if row == worst // 2 else "passed" for row in range(2)]
    assert (verdict.threshold, verdict.score) == (cut, None)
    assert verdict.images[worst % 2].memorized and not verdict.images[1 - worst % 2].memorized
    assert verdict.reason.startswith("norm ") and verdict.reason.endswith("; so blocked are 1 of 2 images")


def test_a_run_ends_when_all_are_memorized(watched):
    pipe, detector, prompts, options, bare, _ = watched
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, monitor=calibration(-1e9))(prompts, generator=seeded(), **options)
        assert len(calls) == 1 and result.output is None and actions(result) == ["blocked", "blocked"]
        del calls[:]
        late = calibration(-1e9, (1e12, 1e12, 0.0, 0.0))
        assert guard(pipe, detector, monitor=late)(prompts, generator=seeded(), **options).output is None
        assert len(calls) == 3
        result = guard(pipe, detector, "flag", monitor=late)(prompts, generator=seeded(), **options)
    assert actions(result) == ["flagged", "flagged"] and all(map(same, result.images, bare))
    assert "after 3 of 4 steps" in result.verdicts[0].reason


def test_reseed(watched):
    """The memorized image alone, from what its own generator draws next; the others stay as they were."""
    pipe, detector, prompts, options, _, _ = watched
    options |= {"negative_prompt": ["red", ""], "output_type": "np"}
    bare = pipe(prompts, generator=[seeded(seed) for seed in range(4)], **options).images
    flag = guard(pipe, detector, "flag", monitor=calibration(1e9))
    seen = flag(prompts, generator=[seeded(seed) for seed in range(4)], **options)
    values = [image.value for verdict in seen.verdicts for image in verdict.images]
    worst, generator = values.index(max(values)), seeded(values.index(max(values)))
    torch.randn(1, 4, 8, 8, generator=generator)
    alone = {"generator": [generator], "num_images_per_prompt": 1, "negative_prompt": ["red", ""][worst // 2]}
    other = flag(prompts[worst // 2], **options | alone)
    cut = middle([*values, other.verdicts[0].images[0].value], 1)
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "reseed", monitor=calibration(cut))(
            prompts, generator=[seeded(seed) for seed in range(4)], **options
        )
    assert [len(call.output) for call in calls if len(call.output) % 2 == 0 and len(call.output) != 4] == [8] * 4 + [
        2
    ] * 4
    assert all(same(result.images[place], bare[place]) for place in range(4) if place != worst)
    torch.testing.assert_close(torch.tensor(result.images[worst]), torch.tensor(other.images[0]), rtol=0, atol=1e-4)
    assert actions(result)[worst // 2] == "reseeded" and len(result.output.images) == 4
    assert "; made again from other noise, 1 time; so reseeded are 1 of 2 images" in result.verdicts[worst // 2].reason


def test_reseed_in_vain(watched):
    pipe, detector, prompts, options, _, _ = watched
    with recorded(pipe.unet) as calls:
        result = guard(pipe, detector, "reseed", monitor=calibration(-1e9))(prompts, generator=seeded(), **options)
    assert [len(call.output) for call in calls] == [8] * 4
    assert len({float(call.output.sum()) for call in calls}) == 4
    assert result.images == [None] * 4 and result.output is None
    assert "; made again from other noise, 3 times" in result.verdicts[0].reason


def test_steered_from_where_it_is_known(watched):
    """From the step at which it is known; one known at a timestep of low noise is blocked, and the run ends."""
    pipe, detector, prompts, options, bare, _ = watched
    early = guard(pipe, detector, "steer")
    steered = guard(pipe, detector, "steer", monitor=calibration(-1e9))(prompts, generator=seeded(), **options)
    assert actions(steered) == ["steered", "steered"] and "in 1 of 4 steps" in steered.verdicts[0].reason
    by_scores = early(prompts, generator=seeded(), **options)
    assert all(map(same, steered.images[2:], by_scores.images[2:])) and all(map(same, by_scores.images[:2], bare[:2]))
    with recorded(pipe.unet) as calls:
        late = calibration(-1e9, (1e12, 0.0))
        result = guard(pipe, detector, "steer", monitor=late)(prompts, generator=seeded(), **options)
    assert len(calls) == 2 and actions(result) == ["blocked", "blocked"] and result.output is None
    assert "not steered: timestep 501 is the first that could be" in result.verdicts[0].reason


def test_what_is_asked_for_is_what_was_calibrated(watched):
    pipe, detector, prompts, options, _, _ = watched
    guarded = guard(pipe, detector, monitor=calibration(1e9))
    assert repr(guarded) == "<StableDiffusionPipeline guarded by the monitor, memorized prompts are blocked>"
    with pytest.raises(InputError, match="StableDiffusionPipeline, DDIMScheduler, 4 steps, guidance 5, and not for"):
        guarded(prompts, **options | {"num_inference_steps": 5})
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(InputError, match="and not for StableDiffusionPipeline, DPMSolverMultistepScheduler"):
        guarded(prompts, **options)


def test_beside_the_engine(watched):
    pipe, detector, prompts, options, bare, _ = watched
    path = detector.info.path / "monitor.json"
    with pytest.raises(InputError, match=r"monitor.json cannot be read .*: make a calibration with Monitor.calibrate"):
        guard(pipe, detector, monitor=True)
    calibration(1e9).save(path)
    try:
        result = guard(pipe, detector, monitor=True)(prompts, generator=seeded(), **options)
    finally:
        path.unlink()
    assert actions(result) == ["passed", "passed"] and all(map(same, result.images, bare))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"monitor": 3}, "monitor is int: give True or a MonitorCalibration"),
        ({"monitor": calibration(1.0), "first_step": 1.0}, "The monitor has a calibration of its own"),
        ({"monitor": calibration(1.0), "threshold": 1.0}, "The monitor has a calibration of its own"),
        ({"monitor": calibration(1.0), "action": "mitigate"}, "leave monitor out"),
        ({"action": "reseed"}, "give monitor=True"),
    ],
)
def test_wrong_options(small, options, words):
    with pytest.raises(InputError, match=words):
        guard(small.pipe, small.detector, **options)
    other = StableDiffusionImg2ImgPipeline(**small.pipe.components, requires_safety_checker=False)
    with pytest.raises(InputError, match="of pipelines from text, not StableDiffusionImg2ImgPipeline"):
        guard(other, small.detector, "reseed", monitor=calibration(1.0))


def of(pipe: Any, **more: Any) -> MonitorCalibration:
    """One that nothing reaches, for a pipeline's class."""
    return calibration(1e9, settings=msgspec.structs.replace(SETTINGS, pipeline=type(pipe).__name__), **more)


def test_beside_a_controlnet(small):
    """What the UNet itself predicts is seen, so the picture's guidance too; a negative prompt is refused."""
    pipe, detector = with_controlnet(small.pipe), small.detector
    pipe.scheduler.register_to_config(steps_offset=1)
    prompts, pictures = [small.clean[0], small.memorized[0]], [Image.new("RGB", (8, 8), c) for c in ("red", "navy")]
    bare = pipe(prompts, pictures, generator=seeded(), **OPTIONS).images
    guarded = guard(pipe, detector, "flag", monitor=of(pipe))
    with recorded(pipe.unet) as calls:
        result = guarded(prompts, pictures, generator=seeded(), **OPTIONS)
    assert actions(result) == ["passed", "passed"] and all(map(same, result.images, bare))
    first = calls[0].output[2:] - calls[0].output[:2]
    assert [verdict.norm for verdict in result.verdicts] == pytest.approx(
        first.flatten(1).norm(dim=1).tolist(), rel=1e-5
    )
    with pytest.raises(InputError, match="ControlNet reads the negative prompt too"):
        guarded(prompts, pictures, negative_prompt=["blurry"] * 2, **OPTIONS)


def test_v_prediction(copy, checkpoint):
    """In ε: √ᾱ times the difference of velocities, and the first norm as `first_step` has it."""
    edit_manifest(copy, lambda m: m.update(prediction_type="v_prediction"))
    pipe = make_pipe(StableDiffusionPipeline, checkpoint)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction", steps_offset=1)
    detector = Detector.load(copy)
    bare = pipe("a star", generator=seeded(), **OPTIONS).images
    result = guard(pipe, detector, "flag", monitor=of(pipe))("a star", generator=seeded(), **OPTIONS)
    assert same(result.images[0], bare[0])
    first = guard(pipe, detector, "flag", first_step=1e9)("a star", generator=seeded(), **OPTIONS)
    assert result.verdicts[0].norm == pytest.approx(first.verdicts[0].norm, rel=1e-5)


@pytest.mark.slow
def test_sdxl(sdxl):
    """With a negative prompt: the monitor sees the empty one's half, and the images stay as they are."""
    pipe, detector, clean, memorized = sdxl
    pipe.scheduler.register_to_config(steps_offset=1)
    prompts, options = [clean[0], memorized[0]], OPTIONS | {"negative_prompt": "red"}
    bare = pipe(prompts, generator=seeded(), **options).images
    result = guard(pipe, detector, "flag", monitor=of(pipe, looks=2))(prompts, generator=seeded(), **options)
    assert actions(result) == ["passed", "passed"] and all(map(same, result.images, bare))
    without = guard(pipe, detector, "flag", monitor=of(pipe))(prompts, generator=seeded(), **OPTIONS)
    norms = [[verdict.norm for verdict in one.verdicts] for one in (result, without)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
