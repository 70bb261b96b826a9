"""Guidance distilled into the embedded model, on made-up latents: where the student begins, what it learns from."""

import json

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow  # the embedded model is loaded in torch


@pytest.fixture
def distillation():
    from dataset import Caption
    from distil import Distillation
    from targets import load

    data = [Caption("a star", "seen", "one", "held-out", ((0, 3), (1, 2)))]
    latents = np.random.default_rng(0).normal(size=(2, 4, 16, 16)).astype(np.float16)
    return Distillation(data, latents, load(), 0, 1)


def test_what_it_learns_from(distillation):
    """At first the student is its teacher at any scale, so what is missing is (g − 1) (ε_c − ε_0)."""
    _, latent, noise, timestep, scale = distillation.draw()
    assert 1 <= float(scale.min()) < float(scale.max()) <= 8
    caption = torch.tensor([0, 1] * 16)  # the caption, and the empty prompt
    _, errors = distillation.loss(caption, latent, noise, timestep, scale)
    alpha = distillation.alphas[timestep][:, None, None, None]
    noisy = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        cond, uncond = (
            distillation.teacher.unet(noisy, timestep, distillation.states[[which] * 32]).sample for which in (0, 1)
        )
    expected = (scale - 1) ** 2 * (cond - uncond).double().square().mean((1, 2, 3)) * (caption == 0)
    assert float(expected.max()) > 0.01
    torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-5)


def test_it_learns_and_is_saved_as_one_that_is_told(distillation, tmp_path):
    batch = distillation.draw()
    distillation.draw = lambda: batch
    errors = [distillation.advance(1000) for _ in range(4)]
    assert errors[-1] < errors[0]
    distillation.pipeline(tmp_path / "pipeline")
    config = json.loads((tmp_path / "pipeline/unet/config.json").read_text())
    assert config["time_cond_proj_dim"] == 256
