"""Generation by the flow-matching model with classifier-free guidance, as generate.py does it for the embedded one."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from dataset import Caption, load_captions
from flow_model import FlowModel, scheduler
from generate import CHUNK, GUIDANCE, SHAPE, STEPS, Generator, compiled, noise
from model import Model


def load(data: Path, pipeline: Path, flow: bool) -> tuple[list[Caption], Model | FlowModel]:
    """Return captions and model: the embedded one's, in `data`, or of flow_train.py, beside the pipeline."""
    captions = load_captions((pipeline.parent if flow else data) / "captions.json")
    return captions, FlowModel.load(pipeline) if flow else Model.load(pipeline)


def generator_of(model: Model | FlowModel, threads: int | None = None) -> "Generator | FlowGenerator":
    """Return what generates with a model of either kind."""
    return FlowGenerator(model, threads) if isinstance(model, FlowModel) else Generator(model, threads)


class FlowGenerator:
    """Makes latents from prompts."""

    def __init__(self, model: FlowModel, threads: int | None = None):
        self.model = model
        threads = threads or len(os.sched_getaffinity(0))
        self._empty = tuple(values[0] for values in model.encode([""]))
        states, pooled = (torch.zeros(2 * CHUNK, *values.shape) for values in self._empty)
        example = torch.randn(2 * CHUNK, *SHAPE), torch.full((2 * CHUNK,), 500.0), states, pooled
        self._transformer = compiled(_Positional(model.transformer), example, threads)
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))

    def latents(self, prompts: list[str], seeds: range) -> torch.Tensor:
        """Return latents [len(prompts), len(seeds), 4, 16, 16], by Euler steps from pure noise."""
        parts = [values.repeat_interleave(len(seeds), 0).split(CHUNK) for values in self.model.encode(prompts)]
        noisy = noise(seeds).repeat(len(prompts), 1, 1, 1).split(CHUNK)
        found = torch.cat(list(self._pool.map(partial(_denoise, self._transformer, self._empty), noisy, *parts)))
        return found.reshape(len(prompts), len(seeds), *SHAPE)


def _denoise(
    transformer: Callable[..., np.ndarray],
    empty: tuple[torch.Tensor, ...],
    latent: torch.Tensor,
    states: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    count = len(latent)
    euler = scheduler()
    euler.set_timesteps(STEPS)
    # One compiled shape: what is behind `count` is not looked at.
    text = [np.zeros((2 * CHUNK, *values.shape[1:]), np.float32) for values in (states, pooled)]
    for rows, none, own in zip(text, empty, (states, pooled), strict=True):
        rows[:CHUNK], rows[CHUNK : CHUNK + count] = none, own
    rows = np.zeros((2 * CHUNK, *SHAPE), np.float32)
    for t in euler.timesteps:
        rows[:count] = rows[CHUNK : CHUNK + count] = latent
        v = torch.from_numpy(transformer(rows, np.full(2 * CHUNK, float(t), np.float32), *text))
        uncond, cond = v[:count], v[CHUNK : CHUNK + count]
        latent = euler.step(uncond + GUIDANCE * (cond - uncond), t, latent).prev_sample
    return latent


class _Positional(torch.nn.Module):
    def __init__(self, transformer: torch.nn.Module):
        super().__init__()
        self.transformer = transformer

    def forward(
        self, latent: torch.Tensor, timestep: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        v: torch.Tensor = self.transformer(latent, states, pooled, timestep, return_dict=False)[0]
        return v
