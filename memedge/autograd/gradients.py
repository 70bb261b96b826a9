"""Derivatives by torch's autograd on the checkpoint itself: for engines whose graphs have none, and to compare with."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from memedge.autograd.unet import load_unet
from memedge.engine.arrays import Singles
from memedge.engine.engine import Engine
from memedge.engine.errors import NotFiniteError
from memedge.engine.gradients import Gradient
from memedge.engine.manifest import Operands


class TorchGradients:
    """See Gradients. The checkpoint's UNet runs in torch in float32, on the engine's noise; ε_0 is torch's own, too."""

    def __init__(self, engine: Engine, checkpoint: str):
        """Load the checkpoint.

        Args:
            engine: encodes the empty prompt, and has the noise.
            checkpoint: what `memedge export` made the engine of (unet.load_unet).

        Raises:
            ExportError: the checkpoint cannot be read.
            InputError: the engine was made of another one.
        """
        manifest = engine.directory.manifest
        self._unet = load_unet(engine.directory, checkpoint).requires_grad_(False)
        self._draws, self._factor = engine.draws, manifest.norm_factor
        # A backward pass keeps what a forward one lets go: with fewer rows it takes about as much memory.
        self._rows = max(1, engine.rows_per_call // 4)
        noise = torch.tensor(engine.directory.baseline.sample)
        self._latents = torch.cat([noise, noise])
        self._timesteps = torch.tensor(manifest.timesteps).repeat_interleave(engine.draws)
        self._scale = manifest.epsilon_factor
        empty = engine.encode(engine.tokenize([""])[0])
        self._empty = torch.from_numpy(engine.backend.memory.download(empty.tensor))
        with torch.no_grad():
            self._uncond = torch.cat(
                [self._predict(rows, self._empty.expand(len(rows), -1, -1)) for rows in self._blocks(2 * engine.draws)]
            )

    def statistics(
        self, states: Singles, norm_weight: float, alignment_weight: float, operands: Operands = "uncond_delta"
    ) -> Gradient:
        leaf = torch.tensor(states, requires_grad=True)
        per_prompt = (2 if alignment_weight else 1) * self._draws
        found = torch.zeros(len(states) * per_prompt, dtype=torch.float64)
        for block in self._blocks(len(found)):
            row = block % per_prompt
            cond, uncond = self._predict(row, leaf[block // per_prompt]).double(), self._uncond[row].double()
            norm = self._factor * torch.linalg.vector_norm(cond - uncond, dim=(1, 2, 3))
            other = cond if operands == "cond_uncond" else cond - uncond
            cosine = F.cosine_similarity(uncond, other, dim=1, eps=1e-8).mean((1, 2))
            first = row < self._draws
            values = torch.where(first, norm, cosine)
            weights = torch.where(first, norm_weight, alignment_weight) / self._draws
            torch.autograd.backward((weights * values).sum())
            found[block] = values.detach()
        means = found.reshape(len(states), -1, self._draws).mean(dim=2).numpy()
        assert leaf.grad is not None
        gradient = leaf.grad.numpy()
        _check_finite(means, gradient)
        alignment = means[:, 1] if alignment_weight else np.full(len(states), np.nan)
        return Gradient(means[:, 0], alignment, gradient)

    def noise(self, states: Singles, latents: Singles, cotangent: Singles) -> Singles:
        x, c = torch.tensor(latents), torch.tensor(cotangent)
        pair = torch.cat([torch.tensor(states)[None], self._empty])
        parts: list[torch.Tensor] = []
        for block in self._blocks(len(x)):
            leaf, count = x[block].requires_grad_(), len(block)
            timestep = self._timesteps[0].expand(2 * count)
            cond, uncond = self._unet(leaf.repeat(2, 1, 1, 1), timestep, pair.repeat_interleave(count, dim=0)).chunk(2)
            parts += torch.autograd.grad(self._scale * (cond - uncond), leaf, c[block])
        found: Singles = torch.cat(parts).numpy()
        _check_finite(found)
        return found

    def _predict(self, row: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        prediction: torch.Tensor = self._unet(self._latents[row], self._timesteps[row], states)
        return prediction

    def _blocks(self, count: int) -> Iterator[torch.Tensor]:
        """Yield the numbers 0 … count − 1, as many at a time as one call takes rows."""
        for start in range(0, count, self._rows):
            yield torch.arange(start, min(start + self._rows, count))


def _check_finite(*arrays: npt.NDArray[np.floating]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise NotFiniteError("The model's derivatives hold NaN or infinity in float32: no step can be made from them.")
