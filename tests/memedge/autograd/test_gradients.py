"""Derivatives against differences of what the engine itself computes, on every kind of model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import architectures
import gradient_sources
import numpy as np
import pytest
import sd3
import torch
from models import make_checkpoint
from torch_denoiser import EMOJI

from memedge import InputError
from memedge.autograd.gradients import TorchGradients
from memedge.autograd.unet import load_unet
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.denoiser import Denoiser
from memedge.engine.engine import Engine
from memedge.engine.errors import NotFiniteError
from memedge.engine.gradients import Gradients
from memedge.export.export import export

PROMPTS = ["the left luggage sign", "a red bicycle", "zebra on skis!"]
WEIGHTS = [(1.0, 0.0), (0.7, -6.0), (0.0, 1.0)]
OPERANDS = ["uncond_delta", "cond_uncond"]


@dataclass(frozen=True)
class Model:
    """An engine, the derivatives of one source, and embeddings of PROMPTS, [3, K, D]."""

    engine: Engine
    checkpoint: Path
    gradients: Gradients
    states: np.ndarray

    def statistics(self, states: np.ndarray, weights: tuple[float, float], operands: str) -> np.ndarray:
        norm, aligned = self.engine.statistics(self.engine.embed(states), "channel", operands)
        return weights[0] * norm + weights[1] * aligned


@pytest.fixture(
    scope="module", params=["emoji", *(pytest.param(n, marks=pytest.mark.slow) for n in ("velocity", "sdxl", "sd3"))]
)
def engine(request, tmp_path_factory) -> tuple[Engine, Path]:
    """One draw of a trained model, two of a random one that predicts v, and one of SDXL's kind and of SD 3's."""
    checkpoint, folder = EMOJI, EMBEDDED_ENGINE
    if request.param != "emoji":
        folder = tmp_path_factory.mktemp(request.param) / "engine"
        checkpoint = folder.with_name("checkpoint")
        if request.param == "sdxl":
            checkpoint = architectures.build("sdxl", checkpoint)
        elif request.param == "sd3":
            checkpoint = sd3.build(checkpoint)
        else:
            make_checkpoint(checkpoint, "v_prediction")
        length = 20 if request.param == "sd3" else None
        export(checkpoint, folder, draws=2 if request.param == "velocity" else 1, max_sequence_length=length)
    return Engine.open(folder, "cpu", None, 1), checkpoint


@pytest.fixture(scope="module", params=gradient_sources.SOURCES)
def model(request, engine) -> Model:
    opened, checkpoint = engine
    states = opened.backend.memory.download(opened.encode(opened.tokenize(PROMPTS)[0]).tensor)
    return Model(opened, checkpoint, gradient_sources.make(request.param, opened, checkpoint), states)


def halves(gradient: np.ndarray) -> list[np.ndarray]:
    """Return unit vectors: the gradient's direction, and those of three random halves of its entries.

    Only the true gradient has with each of them a product that is the true derivative there.
    """
    generator = np.random.default_rng(0)
    masks = [np.ones(gradient.shape, dtype=bool), *(generator.random((3, *gradient.shape)) < 0.5)]
    kept = [gradient.astype(np.float64) * mask for mask in masks]
    return [part / np.linalg.norm(part) for part in kept]


@pytest.mark.parametrize("operands", OPERANDS)
def test_statistics_are_the_engines(model, operands):
    norm, aligned = model.engine.statistics(model.engine.embed(model.states), "channel", operands)
    found = model.gradients.statistics(model.states, 1.0, 0.5, operands)
    np.testing.assert_allclose(found.norm, norm, rtol=1e-4)
    np.testing.assert_allclose(found.alignment, aligned, atol=1e-4)
    assert (found.norm.dtype, found.alignment.dtype, found.states.dtype) == (np.float64, np.float64, np.float32)
    alone = model.gradients.statistics(model.states, 1.0, 0.0)
    np.testing.assert_allclose(alone.norm, norm, rtol=1e-4)
    assert np.isnan(alone.alignment).all()


def derivative(value: Callable[[float], float], step: float) -> float:
    """Return value'(0) by central differences, whose errors of order h² cancel."""
    outer, inner = ((value(h) - value(-h)) / (2 * h) for h in (step, step / 2))
    return (4 * inner - outer) / 3


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_states(model, weights, operands):
    """Against differences of the forward engine's statistics; those are in float32, and good to some parts in 1000."""
    found = model.gradients.statistics(model.states, *weights, operands).states
    assert found.shape == model.states.shape
    for own, gradient in zip(model.states[:2], found, strict=False):
        for direction in halves(gradient):

            def value(h: float, own=own, direction=direction) -> float:
                return float(model.statistics((own + h * direction).astype(np.float32)[None], weights, operands)[0])

            expected = derivative(value, 0.004 * np.linalg.norm(own))
            assert float((gradient * direction).sum()) == pytest.approx(expected, rel=0.01)


def test_prompts_do_not_meet(model):
    """A prompt's derivative is its own, in any company; weights scale it."""
    together = model.gradients.statistics(model.states, 1.0, 0.5)
    alone = model.gradients.statistics(model.states[1:2], 2.0, 1.0)
    tolerance = 1e-4 * np.abs(alone.states).max()
    np.testing.assert_allclose(2 * together.states[1], alone.states[0], rtol=0, atol=tolerance)


def test_padding_of_the_pooled_row(model):
    manifest = model.engine.directory.manifest
    row = model.gradients.statistics(model.states, 1.0, 1.0).states[:, -1]
    assert np.abs(row[:, : manifest.pooled_width or None]).max() > 0
    if manifest.pooled_width:
        assert (row[:, manifest.pooled_width :] == 0).all()


def test_noise(model):
    """⟨Jᵀc, d⟩ against differences of ⟨c, Δ(x + hd)⟩, on noise of any number.

    In float64: the trained model's Δ bends so soon that differences over h = 0.02 are 3 % off, and over less they are
    rounding in float32.
    """
    manifest, generator = model.engine.directory.manifest, np.random.default_rng(1)
    denoiser, prompts = Denoiser(model.engine), np.zeros(7, dtype=np.int64)
    latents = denoiser.noise(7, seed=3)
    cotangent = generator.standard_normal(latents.shape, dtype=np.float32)
    found = model.gradients.noise(model.states[0], latents, cotangent)
    assert (found.shape, found.dtype) == (latents.shape, np.float32)

    unet = load_unet(model.engine.directory, str(model.checkpoint)).double()
    empty = model.engine.backend.memory.download(model.engine.encode(model.engine.tokenize([""])[0]).tensor)
    both = torch.from_numpy(np.concatenate([model.states[:1], empty]).astype(np.float64))
    scale = manifest.alphas_cumprod[0] ** 0.5 if manifest.prediction_type == "v_prediction" else 1

    @torch.no_grad()
    def delta(x: np.ndarray) -> np.ndarray:
        cond, uncond = unet(torch.from_numpy(x).expand(2, *x.shape), torch.full((2,), manifest.timesteps[0]), both)
        return scale * (cond - uncond).numpy()

    cond, uncond = denoiser.guidance(model.engine.embed(model.states[:1]), prompts, latents, manifest.timesteps[0])
    for row in (0, 6):
        x, gradient = latents[row].astype(np.float64), found[row]
        np.testing.assert_allclose(delta(x), cond[row] - uncond[row], rtol=0, atol=1e-4)
        for direction in halves(gradient):

            def value(h: float, x=x, c=cotangent[row], direction=direction) -> float:
                return float((c * delta(x + h * direction)).sum())

            assert float((gradient * direction).sum()) == pytest.approx(derivative(value, 1e-3), rel=1e-3)


def test_what_is_not_finite(model):
    states = np.full_like(model.states, np.inf)
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        model.gradients.statistics(states, 1.0, 0.0)
    latents = np.full((1, *model.engine.directory.manifest.latent_shape), np.nan, dtype=np.float32)
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        model.gradients.noise(model.states[0], latents, latents)


def test_another_checkpoint(checkpoint):
    engine = Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)
    with pytest.raises(InputError, match=r"was made of emoji, and .* has other weights: give the checkpoint"):
        TorchGradients(engine, str(checkpoint))
