"""guidance_stats on anyone's own predictions, against docs/methods.md written out in torch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from memedge import InputError, guidance_stats
from memedge.engine.errors import NotFiniteError


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(3)
    uncond = torch.randn(2, 4, 8, 8, generator=generator)
    return uncond + 0.1 * torch.randn(3, 2, 4, 8, 8, generator=generator), uncond


def test_definition(predictions):
    cond, uncond = predictions
    delta = (cond - uncond).double()
    stats = guidance_stats(cond.numpy(), uncond.numpy())
    np.testing.assert_allclose(stats.norm, delta.flatten(2).norm(dim=2), rtol=1e-6)
    channel = F.cosine_similarity(uncond.double().expand_as(delta), delta, dim=2).mean((2, 3))
    np.testing.assert_allclose(stats.alignment, channel, atol=1e-6)
    flat = F.cosine_similarity(cond.double().flatten(2), delta.flatten(2), dim=2)
    stats = guidance_stats(cond, uncond, alignment="flat", operands="cond_delta")
    np.testing.assert_allclose(stats.alignment, flat, atol=1e-6)


def test_velocity(predictions):
    plain = guidance_stats(*predictions)
    for alpha in (0.36, torch.tensor(0.36, dtype=torch.float64)):
        scaled = guidance_stats(*predictions, prediction_type="v_prediction", alpha_cumprod=alpha)
        assert isinstance(scaled.norm, np.ndarray)
        np.testing.assert_allclose(scaled.norm, plain.norm * 0.6 / 0.64, rtol=1e-12)
        np.testing.assert_array_equal(scaled.alignment, plain.alignment)


def test_first_step_of_a_server(predictions):
    """A server's batch of [unconditional, conditional] halves, in bfloat16 as it comes from torch."""
    cond, uncond = predictions
    batch = torch.cat([uncond, cond[0]]).bfloat16()
    e0, ec = batch.chunk(2)
    expected = (ec.double() - e0.double()).flatten(1).norm(dim=1)
    np.testing.assert_allclose(guidance_stats(ec, e0).norm, expected, rtol=1e-6)


def test_same_predictions(predictions):
    stats = guidance_stats(predictions[1], predictions[1])
    assert not stats.norm.any()
    assert not stats.alignment.any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alignment": "pixel"}, "no alignment"),
        ({"operands": "delta"}, "no operands"),
        ({"prediction_type": "sample"}, "no prediction type"),
        ({"prediction_type": "v_prediction"}, "needs alpha_cumprod"),
        ({"prediction_type": np.array(["epsilon", "sample"])}, "no prediction type"),
        ({"alignment": np.array(["channel"])}, "no alignment"),
        ({"prediction_type": "v_prediction", "alpha_cumprod": 1.0}, "needs alpha_cumprod"),
        ({"prediction_type": "v_prediction", "alpha_cumprod": np.array([0.5, 0.6])}, "needs alpha_cumprod"),
        ({"prediction_type": "v_prediction", "alpha_cumprod": "all"}, "needs alpha_cumprod"),
        ({"prediction_type": "v_prediction", "alpha_cumprod": np.nan}, "needs alpha_cumprod"),
    ],
)
def test_wrong_options(predictions, options, words):
    with pytest.raises(InputError, match=words):
        guidance_stats(*predictions, **options)


def test_not_finite(predictions):
    cond, uncond = predictions
    cond[1, 0, 2, 3, 4] = float("nan")
    with pytest.raises(NotFiniteError):
        guidance_stats(cond, uncond)
