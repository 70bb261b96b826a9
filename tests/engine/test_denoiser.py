"""The UNet on latents of one's own, against diffusers' UNet, and against the engine's own noise."""

from pathlib import Path

import numpy as np
import pytest
import reference

from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, NotFiniteError, ProviderError
from memedge.guidance import guidance_stats

PROMPTS = ["the left luggage sign", "", "a red bicycle", "a slice of pizza"]
EMOJI = Path(reference.__file__).parent / "tiny" / "emoji"  # what the embedded engine was exported from


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open(EMBEDDED_ENGINE, "cpu", None, None)


@pytest.fixture(scope="module")
def denoiser(engine) -> Denoiser:
    return Denoiser(engine)


@pytest.fixture(scope="module")
def states(engine):
    return engine.encode(engine.tokenize(PROMPTS)[0])


@pytest.mark.parametrize("timestep", [981, 501, 1])
def test_any_latents_at_any_timestep(denoiser, states, timestep):
    """More rows than one call takes, in no order; scaled, as latents are within a generation."""
    prompts = np.array([2, 0, 3, 0, 2])
    latents = 0.7 * denoiser.noise(5, seed=1)
    expected = reference.guidance(EMOJI, [PROMPTS[i] for i in prompts], latents, timestep)
    found = denoiser.guidance(states, prompts, latents, timestep)
    for own, true in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, true, rtol=0, atol=1e-5 * np.abs(true).max())
    np.testing.assert_allclose(denoiser.predict(states, prompts, latents, timestep), found[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(denoiser.uncond(latents, timestep), found[1], rtol=0, atol=1e-5)


def test_own_noise(engine, denoiser, states):
    """On the engine's own noise it gives what the engine computes from what it cached."""
    norm, alignment = engine.per_draw(states, "channel", "uncond_delta")
    noise = denoiser.noise(1).repeat(len(PROMPTS), axis=0)
    at_norm, at_cos = (denoiser.guidance(states, states.all, noise, t) for t in denoiser.manifest.timesteps)
    np.testing.assert_allclose(guidance_stats(*at_norm).norm, norm[:, 0], rtol=1e-5)
    np.testing.assert_allclose(guidance_stats(*at_cos).alignment, alignment[:, 0], atol=1e-5)
    assert norm[1, 0] == guidance_stats(*at_norm).norm[1] == 0  # the empty prompt


def test_noise(denoiser):
    own = denoiser.engine.directory.baseline.sample
    three = denoiser.noise(3)
    np.testing.assert_array_equal(three[:1], own)
    np.testing.assert_array_equal(denoiser.noise(2), three[:2])  # more draws begin with fewer
    other = denoiser.noise(400, seed=7)
    assert abs(other.mean()) < 0.005
    assert abs(other.std() - 1) < 0.005
    assert (other[:3] == three).mean() < 0.001
    with pytest.raises(InputError, match="draws is 0: give at least 1"):
        denoiser.noise(0)


def test_refusals(denoiser, states):
    x = denoiser.noise(1)
    with pytest.raises(InputError, match="Timestep 500 is none of the engine's schedule"):
        denoiser.predict(states, np.array([0]), x, 500)
    with pytest.raises(NotFiniteError, match="on 1 of 2 latents hold NaN or infinity"):
        denoiser.uncond(np.concatenate([x, np.full_like(x, np.nan)]), 501)
    with pytest.raises(ProviderError, match=r"'openvino' computes on the engine's own noise only.*'cpu' or 'cuda'"):
        Denoiser(Engine.open(EMBEDDED_ENGINE, "openvino", "fp32", None))
