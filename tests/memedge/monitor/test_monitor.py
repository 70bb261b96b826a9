"""The monitor's statistics against their definitions, its verdicts as they come, its map, and what is refused."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from memedge import InputError, Monitor, MonitorCalibration, guidance_stats
from memedge.engine.errors import ManifestError
from memedge.engine.manifest import Estimate
from memedge.monitor.calibration import GenerationSettings
from memedge.monitor.map import enlarged, smoothed
from memedge.monitor.statistics import running_maximum, values

STEPS, SHAPE = 4, (3, 4, 8, 8)
UNKNOWN = Estimate(0.0, 0.0, 1.0)


@pytest.fixture
def given() -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(SHAPE, generator=generator) for _ in range(3)] for _ in range(STEPS)]


def calibration(**more: Any) -> MonitorCalibration:
    own = {
        "settings": GenerationSettings("StableDiffusionPipeline", "DDIMScheduler", STEPS, 4.0),
        "timesteps": (900.0, 600.0, 300.0, 1.0),
        "statistic": "mean norm",
        "looks": 3,
        "mean": (3.0, 3.0, 3.0),
        "deviation": (0.5, 0.25, 0.2),
        "cut": 1.0,
        "target_fpr": 0.1,
        "clean": 10,
        "memorized": 10,
        "found": UNKNOWN,
        "false_alarms": UNKNOWN,
    }
    return MonitorCalibration(**own | more)


def test_statistics_are_those_of_the_papers(given):
    monitor = Monitor()
    for place, tensors in enumerate(given):
        monitor.step(*tensors, t=900 - place)
    x, cond, uncond = (torch.stack(each).double() for each in zip(*given, strict=True))
    norms = (cond - uncond).flatten(2).norm(dim=2).numpy()
    np.testing.assert_allclose(monitor.norms, norms, rtol=1e-6)
    np.testing.assert_allclose(monitor.norm, norms[0], rtol=1e-6)
    np.testing.assert_allclose(monitor.mean_norm(2), norms[:2].mean(0), rtol=1e-6)
    np.testing.assert_allclose(monitor.mean_norm(), norms.mean(0), rtol=1e-6)
    np.testing.assert_allclose(monitor.changes, cond.diff(dim=0).square().flatten(2).sum(2).numpy(), rtol=1e-5)
    np.testing.assert_allclose(monitor.moves, x.diff(dim=0).flatten(2).norm(dim=2).numpy(), rtol=1e-6)
    np.testing.assert_allclose(monitor.map(smooth=False), (cond[-1] - uncond[-1]).square().sum(1).numpy(), rtol=1e-5)


@pytest.mark.parametrize("by", ["t", "sigma"])
def test_velocities_are_seen_as_the_noise_that_they_are(given, by):
    alphas = np.linspace(0.99, 0.01, 1000)
    monitor, plain = Monitor(prediction_type="v_prediction", alphas_cumprod=alphas), Monitor()
    for t, (x, cond, uncond) in zip((900, 500, 100, 3), given, strict=True):
        alpha = alphas[t]
        level = {"t": t} if by == "t" else {"sigma": math.sqrt((1 - alpha) / alpha)}
        monitor.step(x, cond, uncond, **level)
        eps = [math.sqrt(alpha) * v + math.sqrt(1 - alpha) * x for v in (cond, uncond)]
        plain.step(x, *eps, t)
    for name in ("norms", "changes", "moves"):
        np.testing.assert_allclose(getattr(monitor, name), getattr(plain, name), rtol=1e-5)
    first = guidance_stats(*given[0][1:], prediction_type="v_prediction", alpha_cumprod=alphas[900])
    np.testing.assert_allclose(monitor.norm, first.norm, rtol=1e-6)


def test_a_verdict_comes_as_soon_as_it_is_known_and_stays():
    # log of the mean norm: 3, 3, 3 is clean; the images reach the cut at the second step, never, and at once.
    norms = np.exp([[3.0, 3.0, 3.6], [3.5, 3.05, 0.0], [0.0, 3.05, 0.0], [9.0, 9.0, 9.0]])
    monitor = Monitor(calibration())
    seen = []
    for row, t in zip(norms, (900, 600, 300, 1), strict=True):
        cond = row[:, None, None, None].astype(np.float32)
        monitor.step(np.zeros_like(cond), cond, np.zeros_like(cond), t)
        seen.append([(verdict.memorized, verdict.step) for verdict in monitor.verdicts()])
    assert seen[0] == [(None, 1), (None, 1), (True, 1)]
    assert seen[1] == [(True, 2), (None, 2), (True, 1)]
    assert seen[2] == seen[3] == [(True, 2), (False, 3), (True, 1)]  # the last step is not looked at
    assert monitor.memorized.tolist() == [True, False, True]
    assert monitor.decided
    assert monitor.verdicts()[0].reason == "mean norm 1.12 deviations from clean ≥ cut 1 after 2 of 4 steps"


def test_values_and_running_maxima_by_their_definitions():
    generator = np.random.default_rng(0)
    norms, changes, moves = (np.exp(generator.normal(size=(k, 5))) for k in (4, 3, 3))
    np.testing.assert_allclose(values("mean norm", norms, changes, moves)[2], np.log(norms[:3].mean(0)))
    np.testing.assert_allclose(values("change", norms, changes, moves)[1:], np.log(changes))
    of, mean, deviation = values("move", norms, changes, moves), np.full(4, 0.1), np.full(4, 2.0)
    highest = running_maximum("move", of, mean, deviation)
    assert (highest[0] == -np.inf).all()
    np.testing.assert_allclose(highest[3], np.abs((np.log(moves) - 0.1) / 2).max(0))
    one_sided = running_maximum("norm", np.log(norms), mean, deviation)
    np.testing.assert_allclose(one_sided[1], ((np.log(norms[:2]) - 0.1) / 2).max(0))


def test_the_map_is_smoothed_by_means_and_enlarged_between_pixels():
    generator = np.random.default_rng(0)
    values = generator.random((2, 20, 15), np.float32)
    found = smoothed(values)
    assert found[1, 7, 9] == pytest.approx(values[1, 6:9, 8:11].mean(), rel=1e-5)  # 13 / 64 of 15 is 3
    assert found[0, 0, 14] == pytest.approx(values[0, :2, 13:].mean(), rel=1e-5)
    large = enlarged(values, (40, 45))
    assert large.shape == (2, 40, 45)
    np.testing.assert_allclose(
        large[1], np.asarray(Image.fromarray(values[1]).resize((45, 40), Image.Resampling.BILINEAR))
    )
    for size in (3, (0, 5), ("a", 2), (1, 2, 3)):
        with pytest.raises(InputError, match="height, width"):
            enlarged(values, size)


def test_what_cannot_be_said_is_refused(given):
    with pytest.raises(InputError, match="no prediction type"):
        Monitor(prediction_type="sample")
    monitor = Monitor()
    for what in (lambda: monitor.norm, lambda: monitor.changes, monitor.map):
        with pytest.raises(InputError, match="call step first"):
            what()
    monitor.step(*given[0], t=900)
    with pytest.raises(InputError, match="no calibration"):
        monitor.verdicts()
    with pytest.raises(InputError, match="needs the noise level"):
        Monitor(prediction_type="v_prediction").step(*given[0], t=900)
    with pytest.raises(InputError, match="zero terminal SNR"):
        Monitor(prediction_type="v_prediction", alphas_cumprod=[1.0, 0.0]).step(*given[0], t=1)
    with pytest.raises(InputError, match="Step 1 is at timestep 850, and at 900"):
        Monitor(calibration()).step(*given[0], t=850)


def test_a_calibration_is_kept_and_holds_for_its_generations_alone(tmp_path):
    own = calibration()
    own.save(tmp_path / "monitor.json")
    assert MonitorCalibration.load(tmp_path / "monitor.json") == own
    own.check(GenerationSettings("StableDiffusionPipeline", "DDIMScheduler", STEPS, 4.0))
    for other in (
        {"pipeline": "StableDiffusionImg2ImgPipeline"},
        {"scheduler": "PNDMScheduler"},
        {"steps": 5},
        {"guidance_scale": 7.5},
        {"guidance_rescale": 0.7},
    ):
        with pytest.raises(
            InputError, match="for StableDiffusionPipeline, DDIMScheduler, 4 steps, guidance 4, and not"
        ):
            own.check(msgspec.structs.replace(own.settings, **other))
    with pytest.raises(InputError, match="cannot be read"):
        MonitorCalibration.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="cannot be written"):
        own.save(tmp_path / "none" / "monitor.json")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ManifestError, match="calibrate anew"):
        MonitorCalibration.load(tmp_path / "broken.json")
    calibration(looks=9).save(tmp_path / "short.json")
    with pytest.raises(ManifestError, match="fewer timesteps"):
        MonitorCalibration.load(tmp_path / "short.json")
