"""Find the neurons that a memorized prompt is replicated by (NeMo: Hintersdorf et al., NeurIPS 2024), in small.

Neurons are the output channels of the cross-attention's value projections, `attn2.to_v`. A neuron's activation for a
prompt is the mean of |v| over the tokens. Values are of the text alone, so neither noise nor timestep is in it.

1. A neuron is blocked (v × 0) if its activation is more than θ standard deviations from its mean over clean prompts,
   or among its layer's k highest. θ falls from 5 by .25, and k grows from 0 by 1, until the prompt's noise differences
   are no longer as they were: the highest structural similarity (SSIM) over noise seeds, between unblocked and blocked,
   is under a mark. The search ends at θ = 1; the mark of what follows is then what was reached.
2. Blocked layers, from the last to the first, then single neurons, are given back as long as it stays under the mark.

A noise difference is ε_θ(x, t, prompt) − x, of pure noise x at the second of 50 steps' timesteps and without guidance,
each channel scaled to [0, 1]; as in their code, which takes no step of the scheduler before. Memorized prompts have
about the same one from any seed. So the mark is an SSIM between two seeds of a clean prompt, its mean and a standard
deviation: blocking is enough when the prompt's differences are as unlike what they were as those of a clean prompt are
unlike each other. Only seeds that are above the mark with some other seed are looked at; a prompt without any isn't
memorized by this measure, and gets no neurons.

What differs from the paper: SSIM has one scale and a window of 5 × 5 without weights, as latents are 16 × 16, where
their three scales with a window of 11 need more than 40 pixels a side; the mark is fitted here, and without guidance,
as the prompts are looked at (their code fits it at guidance 7); 4 seeds instead of 10, for time; layers of `up` blocks
too if asked for; and `shared`, for less than the union.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from generate import noise
from model import Model

TIMESTEP = 961  # the second of 50 steps
SEEDS = 4
PLACES = ("down", "mid")
THETAS = np.arange(5, 0.99, -0.25)
WINDOW = 5
DARK, FLAT = 0.01**2, 0.03**2  # SSIM's constants, for values in [0, 1]
Neurons = dict[str, set[int]]  # layer -> output channels


def layers(model: Model, places: tuple[str, ...]) -> dict[str, torch.nn.Linear]:
    """Return the value projections of blocks named so, such as "mid", in the order of the UNet's pass."""
    found = dict(model.unet.named_modules())
    names = [name for place in ("down", "mid", "up") if place in places for name in found if name.startswith(place)]
    return {name: found[name] for name in names if name.endswith("attn2.to_v")}


@torch.inference_mode()
def encode(model: Model, prompts: list[str]) -> torch.Tensor:
    """Return prompt embeddings [P, L, D]."""
    states: torch.Tensor = model.text_encoder(input_ids=model.tokenize(prompts))[0]
    return states


@torch.inference_mode()
def activations(states: torch.Tensor, of: dict[str, torch.nn.Linear]) -> dict[str, torch.Tensor]:
    """Return each layer's mean |v| over tokens, [P, channels], of embeddings [P, L, D]."""
    return {name: layer(states).abs().mean(1) for name, layer in of.items()}


@contextmanager
def blocked(of: dict[str, torch.nn.Linear], neurons: Neurons) -> Iterator[None]:
    """Zero what neurons give, and give it back at the end."""
    kept = {name: of[name].weight.data for name, some in neurons.items() if some}
    for name, weight in kept.items():
        of[name].weight.data = weight.clone()
    zero(of, neurons)
    try:
        yield
    finally:
        for name, weight in kept.items():
            of[name].weight.data = weight


def zero(of: dict[str, torch.nn.Linear], neurons: Neurons) -> None:
    """Zero the weights of neurons; these layers have no bias."""
    for name, some in neurons.items():
        of[name].weight.data[sorted(some)] = 0


def shared(found: list[Neurons], least: int) -> Neurons:
    """Return the neurons that are in at least so many prompts' own."""
    counts: dict[str, Counter[int]] = {}
    for neurons in found:
        for name, some in neurons.items():
            counts.setdefault(name, Counter()).update(some)
    return {name: {neuron for neuron, count in of.items() if count >= least} for name, of in counts.items()}


@torch.inference_mode()
def differences(model: Model, states: torch.Tensor) -> torch.Tensor:
    """Return a prompt's noise differences [SEEDS, 4, 16, 16], each channel in [0, 1], of its embeddings [1, L, D]."""
    noisy = noise(range(SEEDS))
    found = model.unet(noisy, TIMESTEP, states.expand(SEEDS, -1, -1)).sample - noisy
    low, high = found.amin((2, 3), keepdim=True), found.amax((2, 3), keepdim=True)
    return (found - low) / (high - low)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity [N] of maps [N, C, H, W] in [0, 1] (Wang et al., 2004)."""
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(values, WINDOW, 1) for values in (a, b, a * a, b * b, a * b))
    variances = (aa - mean_a**2) + (bb - mean_b**2)
    light = (2 * mean_a * mean_b + DARK) / (mean_a**2 + mean_b**2 + DARK)
    return (light * (2 * (ab - mean_a * mean_b) + FLAT) / (variances + FLAT)).mean((1, 2, 3))


def between_seeds(found: torch.Tensor) -> torch.Tensor:
    """Return the SSIM of each pair of a prompt's noise differences, [SEEDS, SEEDS], with 0 on the diagonal."""
    first, second = torch.triu_indices(len(found), len(found), 1)
    similar = torch.zeros(len(found), len(found))
    similar[first, second] = ssim(found[first], found[second])
    return similar + similar.T


def mark(model: Model, clean: torch.Tensor) -> float:
    """Return the mean and a standard deviation of clean prompts' SSIM between seeds, of embeddings [P, L, D]."""
    first, second = torch.triu_indices(SEEDS, SEEDS, 1)
    similar = torch.stack([between_seeds(differences(model, states[None]))[first, second] for states in clean])
    return float(similar.mean() + similar.std())


class Search:
    """The search for one prompt's neurons after another's."""

    def __init__(self, model: Model, clean: torch.Tensor, places: tuple[str, ...] = PLACES):
        self.model, self.layers, self.mark = model, layers(model, places), mark(model, clean)
        self._clean = {name: torch.std_mean(some, 0) for name, some in activations(clean, self.layers).items()}

    def neurons(self, states: torch.Tensor) -> Neurons:
        """Return the neurons of a prompt's embeddings [1, L, D]: none if it does not seem memorized."""
        unblocked = differences(self.model, states)
        seeds = between_seeds(unblocked).amax(1) > self.mark
        if not seeds.any():
            return {}

        def similarity(neurons: Neurons) -> float:
            with blocked(self.layers, neurons):
                return float(ssim(unblocked[seeds], differences(self.model, states)[seeds]).max())

        under = self.mark
        for k, theta in enumerate(THETAS):
            found = self._outlying(states, float(theta), k)
            reached = similarity(found)
            if reached <= under:
                break
        else:
            under = reached
        for name in reversed(found):
            if similarity(found | {name: set()}) <= under:
                found[name] = set()
        for name in reversed(found):
            for neuron in sorted(found[name]):
                if similarity(found | {name: found[name] - {neuron}}) <= under:
                    found[name] = found[name] - {neuron}
        return found

    def _outlying(self, states: torch.Tensor, theta: float, k: int) -> Neurons:
        """Return the neurons whose activation is beyond θ deviations from that of clean prompts, or in the top k."""
        found = {}
        for name, (value,) in activations(states, self.layers).items():
            deviation, mean = self._clean[name]
            beyond = ((value - mean).abs() / deviation > theta).nonzero().flatten().tolist()
            found[name] = {*beyond, *value.topk(k).indices.tolist()}
        return found
