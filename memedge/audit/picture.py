"""The audit of one picture: a search from all starts until one of them prints it."""

import time
from dataclasses import dataclass

import numpy as np
import torch

from memedge.audit.figures import AuditedImage, AuditSettings, Check
from memedge.audit.pairs import Pair
from memedge.audit.search import DRAWS, EmbeddingSearch, seed_of, starts_of
from memedge.audit.similarity import Similarity
from memedge.autograd.diffusion_model import DiffusionModel, Pictures

SHOWN = 3  # generations that are kept to be looked at


@dataclass(frozen=True)
class Found:
    """A picture's audit, and what to look at.

    Attributes:
        image: the audit.
        embedding: of the best check, float32 [L, D].
        by_prompt: generations of the caption, uint8 [K, S, S, 3]; None without a caption.
        by_audit: generations of the best check.
    """

    image: AuditedImage
    embedding: torch.Tensor
    by_prompt: Pictures | None
    by_audit: Pictures


class PictureAudit:
    """Audits pictures of one size by one model."""

    def __init__(self, model: DiffusionModel, similarity: Similarity, settings: AuditSettings):
        self.model, self.similarity, self.settings = model, similarity, settings
        generator = torch.Generator().manual_seed(settings.seed)
        self._noise = torch.randn(settings.generations, *model.shape, generator=generator)

    def __call__(self, pair: Pair, picture: Pictures) -> Found:
        """Search until a start prints the picture [S, S, 3], or the steps are over."""
        began, settings = time.perf_counter(), self.settings
        latents = self.model.latents(picture[None])
        # As the VAE gives it back: no generation can be sharper.
        target = self.similarity.descriptors(self.model.pictures(latents))
        seed = seed_of(settings.seed, pair.name)
        starts = starts_of(self.model, pair.caption, seed)
        names = list(starts)
        repeated = latents.expand(len(names), -1, -1, -1)
        search = EmbeddingSearch(self.model, repeated, torch.stack(list(starts.values())), seed, settings.rows)
        checks: list[Check] = []
        best: tuple[Check, torch.Tensor, Pictures] | None = None
        by_prompt: Pictures | None = None
        for step in settings.checks:
            while search.steps < step:
                search.step()
            # Before the first step, others than the caption are noise.
            looked_at = names if step else [name for name in names if name == "caption"]
            found = self._check({name: search.embeddings[names.index(name)] for name in looked_at}, step, target)
            checks += [check for check, _ in found]
            if step == 0 and found:
                by_prompt = found[0][1]
            for check, made in found:
                if best is None or (check.copies, check.similarity) > (best[0].copies, best[0].similarity):
                    best = check, search.embeddings[names.index(check.start)].detach().clone(), made
            if best and self._copied(best[0]):
                break
        assert best is not None
        last, embedding, made = best
        copied = self._copied(last)
        image = AuditedImage(
            image=pair.name,
            caption=pair.caption,
            memorized=pair.memorized,
            by_prompt=None if by_prompt is None else self._copied(checks[0]),
            by_audit=copied,
            start=last.start if copied else None,
            steps=last.steps if copied else None,
            similarity=last.similarity,
            checks=checks,
            seconds=time.perf_counter() - began,
        )
        shown = None if by_prompt is None else by_prompt[:SHOWN]
        return Found(image, embedding.cpu(), shown, made[:SHOWN])

    def passes(self, pair: Pair) -> tuple[int, int]:
        """Return the rows of the UNet that a picture costs at most: without gradients, and with."""
        settings, starts = self.settings, 1 if pair.caption is None else 3
        checked = (pair.caption is not None) + starts * (len(settings.checks) - 1)
        return checked * settings.generations * settings.inference_steps * 2, starts * settings.steps * DRAWS

    def _check(
        self, embeddings: dict[str, torch.Tensor], step: int, target: torch.Tensor
    ) -> list[tuple[Check, Pictures]]:
        """Return each start's check, and its generations [G, S, S, 3]."""
        if not embeddings:
            return []
        settings, found, names = self.settings, [], list(embeddings)
        states = torch.stack(list(embeddings.values())).detach()
        noise = self._noise.repeat(len(names), 1, 1, 1)
        latents = self.model.generate(
            states.repeat_interleave(settings.generations, 0),
            noise,
            settings.guidance,
            settings.inference_steps,
            settings.rows,
        )
        made = self.model.pictures(latents)
        similar = (self.similarity.descriptors(made) @ target[0]).numpy().reshape(len(names), -1)
        for name, values, pictures in zip(names, similar, np.split(made, len(names)), strict=True):
            copies = int((values >= self.similarity.copy).sum())
            found.append((Check(name, step, copies, float(values.mean())), pictures))
        return found

    def _copied(self, check: Check) -> bool:
        return check.copies * 2 > self.settings.generations
