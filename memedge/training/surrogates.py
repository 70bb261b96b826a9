"""Surrogates: pictures that a model makes of a caption and that are no copies of the caption's training picture."""

import torch

from memedge.audit.search import seed_of
from memedge.audit.similarity import Similarity
from memedge.autograd.diffusion_model import DiffusionModel, Pictures
from memedge.integrations.steering import SCALE, UNTIL

MOST = 8  # kept of a picture: one alone would be memorized in its place
TRIED = 8
MARGIN = 0.2  # below a copy's similarity: a near copy is no surrogate


class Surrogates:
    """Makes them by a model as it was before it is trained."""

    def __init__(
        self, model: DiffusionModel, similarity: Similarity, guidance: float, inference_steps: int, rows: int, seed: int
    ):
        self._model, self._similarity, self._seed = model, similarity, seed
        self._guidance, self._steps, self._rows = guidance, inference_steps, rows

    def __call__(self, name: str, picture: Pictures, states: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Return latents [K, C, H, W] for a picture [S, S, 3], and whether they are of its caption.

        Guidance of the opposite sign keeps a caption from its copy and leaves much of what it says. Where even so all
        are near copies, they are of the empty prompt.

        Args:
            name: the picture's, which its noise is by.
            picture: uint8.
            states: its caption's embeddings, [L, D].
        """
        model = self._model
        target = self._similarity.descriptors(model.pictures(model.latents(picture[None])))[0]
        generator = torch.Generator().manual_seed(seed_of(self._seed, f"surrogates of {name}"))
        noise = torch.randn(TRIED, *model.shape, generator=generator)
        made = model.generate(
            states.expand(TRIED, -1, -1), noise, self._guidance, self._steps, self._rows, early=SCALE, until=UNTIL
        )
        similar = self._similarity.descriptors(model.pictures(made)) @ target
        others = made[(similar < self._similarity.copy - MARGIN).to(made.device)]
        if len(others):
            return others[:MOST], True
        return model.generate(model.empty.expand(MOST, -1, -1), noise[:MOST], 1.0, self._steps, self._rows), False
