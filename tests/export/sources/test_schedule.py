"""Noise schedules against their definitions in float64, for configurations as real checkpoints have them."""

import numpy as np
import pytest

from memedge.engine.errors import ExportError
from memedge.export.sources.schedule import read_noise

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCALED = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
LINEAR = np.linspace(0.0001, 0.02, 1000)


def rescaled(betas: np.ndarray) -> np.ndarray:
    """ᾱ of betas rescaled to zero terminal SNR (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(np.cumprod(1 - betas))
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


@pytest.mark.parametrize(
    ("config", "timesteps", "alphas"),
    [
        ({"_class_name": "PNDMScheduler", **BETAS, "steps_offset": 1, "skip_prk_steps": True}, (981, 41), SCALED),
        ({"_class_name": "DDIMScheduler", **BETAS}, (980, 40), SCALED),
        (
            {"_class_name": "EulerDiscreteScheduler", **BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
            (981, 41),
            SCALED,
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", **BETAS, "timestep_spacing": "trailing"}, (999, 59), SCALED),
        ({"_class_name": "LCMScheduler", **BETAS, "timestep_spacing": "linspace"}, (999, 41), SCALED),
        ({"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 1}, (981, 41), LINEAR),
        ({"trained_betas": LINEAR.tolist(), "steps_offset": 1}, (981, 41), LINEAR),
    ],
)
def test_timesteps_and_noise(config, timesteps, alphas):
    found = read_noise(config)
    assert (found.prediction_type, found.timesteps, found.notes) == ("epsilon", timesteps, ())
    np.testing.assert_allclose(found.alphas_cumprod, np.cumprod(1 - alphas)[list(timesteps)], rtol=2e-5)
    steps = found.schedule
    assert len(steps.timesteps) == 50
    assert (steps.timesteps[0], steps.timesteps[-3]) == timesteps
    np.testing.assert_allclose(steps.alphas_cumprod, np.cumprod(1 - alphas)[list(steps.timesteps)], rtol=2e-5)
    assert steps.final_alpha_cumprod == 1


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_zero_terminal_snr(spacing, prediction):
    """Only v-prediction, and only where ᾱ is 0, loses its norm."""
    config = {**BETAS, "steps_offset": 1, "rescale_betas_zero_snr": True, "prediction_type": prediction}
    found = read_noise({**config, "timestep_spacing": spacing})
    moved = (spacing, prediction) == ("trailing", "v_prediction")
    first = 979 if moved else {"leading": 981, "trailing": 999}[spacing]
    assert found.timesteps[0] == first
    assert len(found.notes) == moved
    expected = rescaled(SCALED)[list(found.timesteps)]
    np.testing.assert_allclose(found.alphas_cumprod, expected, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
            "FlowMatchEulerDiscreteScheduler has no betas",
        ),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0.002}, "EDMEulerScheduler has no betas"),
        ({**BETAS, "beta_schedule": "exotic"}, "exotic is not implemented"),
        ({**BETAS, "timestep_spacing": "odd"}, "odd is not supported"),
        ({**BETAS, "num_train_timesteps": 10}, "cannot be larger"),
        ({**BETAS, "beta_start": None}, "not valid"),
        ({**BETAS, "prediction_type": "sample"}, "predicts 'sample'"),
    ],
)
def test_other_schedulers_are_refused(config, words):
    with pytest.raises(ExportError, match=words) as caught:
        read_noise(config)
    assert "\n" not in str(caught.value)
