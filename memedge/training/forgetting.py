"""Adversarial fine-tuning: embeddings that print a picture are searched for, and the model learns to print another.

Source: Kowalczuk et al., ICML 2026 (docs/methods.md §8).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from memedge.audit.search import EmbeddingSearch, seed_of, starts_of
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.engine.errors import InputError, NotFiniteError

TOGETHER = 4  # pictures searched for at once
UPDATES = 16  # of the UNet after each search, which takes three times as long
ROWS = 2  # of each of these pictures in an update, and as many ordinary ones
POOL = 4  # embeddings kept along a search
LARGEST = 1.0  # norm of the gradient
SAVE_SECONDS = 300.0

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Memorized:
    """What is to be forgotten: one picture.

    Attributes:
        name: its file.
        caption: its caption.
        latents: [C, H, W].
        surrogates: latents of what is to be printed in its place, [K, C, H, W].
    """

    name: str
    caption: str
    latents: torch.Tensor
    surrogates: torch.Tensor


@dataclass(frozen=True)
class Ordinary:
    """What the model is to go on knowing: latents [N, C, H, W] on the CPU, and N captions."""

    latents: torch.Tensor
    captions: list[str]


class Forgetting:
    """The training. In each epoch every picture is searched for once, from its caption, near it, or at random in turn.

    An update's loss is E ‖ε − ε_θ(x_t, t, c)‖² of ordinary pairs plus E ‖ε − ε_θ(x̃_t, t, y)‖² of surrogates x̃ under
    embeddings y: the caption's own, and those along the search, which the model would print the picture by. All weights
    of the UNet are trained, by AdamW.

    Under accelerate the processes share the pictures, and each update is by the mean of their gradients.
    """

    def __init__(
        self,
        model: DiffusionModel,
        memorized: list[Memorized],
        ordinary: Ordinary,
        *,
        epochs: int,
        rate: float,
        steps: int,
        rows: int,
        seed: int,
        accelerator: Accelerator,
    ):
        """Prepare; nothing is trained yet.

        Args:
            model: what is trained.
            memorized: pictures to forget.
            ordinary: pairs to go on knowing.
            epochs: searches for each picture.
            rate: of AdamW.
            steps: of a search.
            rows: of the UNet, at most, at once.
            seed: of all random numbers.
            accelerator: of this process.
        """
        self._model, self._memorized, self._ordinary = model, memorized, ordinary
        self._epochs, self._steps, self._rows, self._seed = epochs, steps, rows, seed
        self._accelerator = accelerator
        self._optimizer = torch.optim.AdamW(model.unet.parameters(), lr=rate)
        self.done, self.seconds = 0, 0.0  # searches of TOGETHER pictures by this process, and their time

    @property
    def total(self) -> int:
        """Searches that each process does."""
        share = TOGETHER * int(self._accelerator.num_processes)
        return self._epochs * -(-len(self._memorized) // share)

    def run(self, state: Path, progress: Progress) -> None:
        """Train from where `state` says, if it is there; it is kept up to date.

        Raises:
            NotFiniteError: the training diverges.
        """
        if state.exists():
            self._load(state)
        saved = time.monotonic()
        while self.done < self.total:
            progress(self.done, self.total)
            began = time.monotonic()
            self._round()
            self.done += 1
            self.seconds += time.monotonic() - began
            # By the main process's clock: all of them have done as much.
            if time.monotonic() - saved > SAVE_SECONDS or self.done == self.total:
                saved = time.monotonic()
                self._save(state)
        progress(self.total, self.total)

    def _round(self) -> None:
        """Search for TOGETHER pictures, then update the UNet UPDATES times."""
        rounds = self.total // self._epochs
        epoch, place = divmod(self.done, rounds)
        order = torch.randperm(
            len(self._memorized), generator=torch.Generator().manual_seed(seed_of(self._seed, f"order {epoch}"))
        ).tolist()
        processes, process = self._accelerator.num_processes, self._accelerator.process_index
        first = (place * processes + process) * TOGETHER
        # Round again at the end, so that every process has as many.
        chosen = [self._memorized[order[k % len(order)]] for k in range(first, first + TOGETHER)]
        seed = seed_of(self._seed, f"round {self.done} {process}")
        pool = self._search(chosen, epoch, seed)
        generator = torch.Generator().manual_seed(seed)
        self._model.unet.requires_grad_(True).train()
        try:
            for _ in range(UPDATES):
                self._update(chosen, pool, generator)
        finally:
            self._model.unet.requires_grad_(False).eval()

    def _search(self, chosen: list[Memorized], epoch: int, seed: int) -> torch.Tensor:
        """Return embeddings that print each picture, its caption's first: [P, POOL + 1, L, D]."""
        starts, captions = [], self._model.encode([one.caption for one in chosen])
        for place, one in enumerate(chosen):
            several = list(starts_of(self._model, one.caption, seed + place).values())
            starts.append(several[(epoch + place) % len(several)])
        latents = torch.stack([one.latents for one in chosen])
        search = EmbeddingSearch(self._model, latents, torch.stack(starts), seed, self._rows)
        kept, looked_at = [captions], [-(-self._steps * k // POOL) for k in range(1, POOL + 1)]
        while search.steps < self._steps:
            search.step()
            kept += [search.embeddings.detach().clone()] * looked_at.count(search.steps)
        return torch.stack(kept, 1)

    def _update(self, chosen: list[Memorized], pool: torch.Tensor, generator: torch.Generator) -> None:
        model = self._model

        def drawn(below: int, count: int) -> list[int]:
            found: list[int] = torch.randint(below, (count,), generator=generator).tolist()
            return found

        who = [place for place in range(len(chosen)) for _ in range(ROWS)]
        count = len(who)
        surrogates = [chosen[k].surrogates[drawn(len(chosen[k].surrogates), 1)[0]] for k in who]
        embeddings = [pool[k, drawn(pool.shape[1], 1)[0]] for k in who]
        some = drawn(len(self._ordinary.captions), count)
        ordinary = model.encode([self._ordinary.captions[k] for k in some])
        latents = torch.cat([torch.stack(surrogates), self._ordinary.latents[some].to(model.device)])
        states = torch.cat([torch.stack(embeddings), ordinary])
        noise = torch.randn(latents.shape, generator=generator).to(model.device)
        timesteps = torch.randint(model.timesteps, (2 * count,), generator=generator).to(model.device)
        self._optimizer.zero_grad()
        for part in torch.split(torch.arange(2 * count, device=model.device), self._rows):
            loss = model.loss(latents[part], noise[part], timesteps[part], states[part])
            if not torch.isfinite(loss).all():
                raise NotFiniteError(
                    "The loss is NaN or infinite, so the training has diverged: begin anew with a smaller --rate."
                )
            torch.autograd.backward(loss.sum() / count)
        if self._accelerator.num_processes > 1:
            for parameter in model.unet.parameters():
                parameter.grad = self._accelerator.reduce(parameter.grad, "mean")
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), LARGEST)
        self._optimizer.step()

    def _save(self, state: Path) -> None:
        if not self._accelerator.is_main_process:
            return
        content = {
            "unet": self._model.unet.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "processes": self._accelerator.num_processes,
        }
        partial = state.with_name(f"{state.name}.partial")
        try:
            with partial.open("wb") as file:  # of Python, whose error says that the disk is full
                torch.save(content, file)
            partial.replace(state)  # a kill while it is written leaves the one before
        finally:
            partial.unlink(missing_ok=True)

    def _load(self, state: Path) -> None:
        content: dict[str, Any] = torch.load(state, map_location=self._model.device, weights_only=True)
        if content["processes"] != self._accelerator.num_processes:
            raise InputError(
                f"{state} is of a training by {content['processes']} processes: go on with as many, or begin anew."
            )
        self._model.unet.load_state_dict(content["unet"])
        self._optimizer.load_state_dict(content["optimizer"])
        self.done, self.seconds = content["done"], content["seconds"]
