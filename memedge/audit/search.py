"""The search for an embedding that makes a model print a picture (DoRI: Kowalczuk et al., ICML 2026)."""

import hashlib

import torch

from memedge.autograd.diffusion_model import DiffusionModel
from memedge.engine.errors import NotFiniteError

RATE = 0.1  # of Adam
DRAWS = 8  # of noise and timestep, in each step
NEARBY = 0.5  # the deviation of what is added to the caption's embeddings, in their own


class EmbeddingSearch:
    """Adam on embeddings y, min E ‖ε − ε_θ(x_t, t, y)‖², with fresh noise and timesteps in each step.

    Every start is searched from by itself, as if it were alone: they share a batch for speed.

    Source: Kowalczuk et al., ICML 2026 (docs/methods.md §8): rate .1, 8 draws.

    Attributes:
        embeddings: where they are now, float32 [S, L, D].
        steps: taken so far.
    """

    def __init__(self, model: DiffusionModel, latents: torch.Tensor, starts: torch.Tensor, seed: int, rows: int):
        """Begin at the starts.

        Args:
            model: what is searched.
            latents: the picture of each start, [S, C, H, W].
            starts: embeddings [S, L, D].
            seed: of the draws.
            rows: of the UNet, at most, at once.
        """
        self.embeddings = starts.detach().clone().requires_grad_()
        self.steps = 0
        self._model, self._latents, self._rows = model, latents, rows
        self._adam = torch.optim.Adam([self.embeddings], lr=RATE)
        # On the CPU: the same draws on every device.
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> torch.Tensor:
        """Take one step; return the mean loss of each start's draws, float32 [S], before it.

        Raises:
            NotFiniteError: a loss is NaN or infinite.
        """
        starts = len(self.embeddings)
        count, device = starts * DRAWS, self._model.device
        noise = torch.randn(count, *self._model.shape, generator=self._generator).to(device)
        timesteps = torch.randint(self._model.timesteps, (count,), generator=self._generator).to(device)
        owner = torch.arange(starts, device=device).repeat_interleave(DRAWS)
        self._adam.zero_grad()
        losses = []
        for some in torch.split(torch.arange(count, device=device), self._rows):
            of = owner[some]
            loss = self._model.loss(self._latents[of], noise[some], timesteps[some], self.embeddings[of])
            if not torch.isfinite(loss).all():
                raise NotFiniteError(
                    "The loss of the search is NaN or infinite: the checkpoint is damaged, or a rate is too high."
                )
            torch.autograd.backward(loss.sum() / DRAWS)
            losses.append(loss.detach())
        self._adam.step()
        self.steps += 1
        return torch.cat(losses).view(starts, DRAWS).mean(1)


def starts_of(model: DiffusionModel, caption: str | None, seed: int) -> dict[str, torch.Tensor]:
    """Return the embeddings that a search begins at, [L, D] by name.

    "random": N(0, σ²), with the deviation of the empty prompt's embeddings. Where there is a caption: "caption", its
    embeddings, and "perturbed", these with noise of half their deviation.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return like.std() * torch.randn(like.shape, generator=generator).to(like.device)

    starts = {"random": noise(model.empty[0])}
    if caption is not None:
        states = model.encode([caption])[0]
        starts = {"caption": states, "perturbed": states + NEARBY * noise(states), **starts}
    return starts


def seed_of(seed: int, name: str) -> int:
    """Return a picture's own seed, so that what is found for it does not depend on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])
