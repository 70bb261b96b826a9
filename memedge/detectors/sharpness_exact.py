"""Sharpness by forward-mode differentiation of the checkpoint itself (Jeon et al., ICML 2025; docs/methods.md §3)."""

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.attention_processor import AttnProcessor

from memedge.autograd.unet import load_unet
from memedge.detectors.draws import per_block
from memedge.engine.arrays import Floats
from memedge.engine.engine import Engine, States


class ExactSharpness:
    """‖H_Δ s_Δ‖₂ at the noisiest timestep, exact but for rounding: the Jacobian's product with s_Δ is a derivative.

    s_Δ = −(ε_c − ε_0) / √(1 − ᾱ) is the difference of the conditional and the unconditional score, H_Δ its Jacobian in
    x. The checkpoint's UNet runs in torch in float32, row by row, on the engine's noise and prompt embeddings.

    Cost: 6 passes per prompt and draw: ε_c and ε_0 for s_Δ, and both again with their derivatives, which take as much.
    """

    name = "sharpness-exact"
    formula = "‖H_Δ s_Δ‖₂ at the first timestep, by forward-mode differentiation in torch (Jeon et al. 2025)"
    passes = 6.0

    def __init__(self, engine: Engine, noise: npt.NDArray[np.float32], checkpoint: str):
        """Load the checkpoint.

        Args:
            engine: encodes the prompts.
            noise: float32 [n, C, H, W].
            checkpoint: what `memedge export` made the engine of (memedge/autograd/unet.py).

        Raises:
            ExportError: the checkpoint cannot be read.
            InputError: the engine was made of another one.
        """
        manifest = engine.directory.manifest
        self._unet = load_unet(engine.directory, checkpoint)
        unet: Any = self._unet.unet
        unet.set_attn_processor(AttnProcessor())  # SDPA has no forward derivative
        self._engine = engine
        self._scale = -manifest.epsilon_factor / sqrt(1 - manifest.alphas_cumprod[0])
        self._timestep = manifest.timesteps[0]
        self._noise = torch.from_numpy(noise)
        self._empty = self._download(engine.encode(engine.tokenize([""])[0]))

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._engine, prompts, len(self._noise), self._score)

    def _score(self, states: States) -> Floats:
        found = np.zeros((len(states.empty), len(self._noise)))
        tensor = self._download(states)
        for prompt in np.flatnonzero(~states.empty):  # of the empty prompt Δ is 0
            both = torch.cat([tensor[prompt, None], self._empty])
            for draw, noise in enumerate(self._noise):
                found[prompt, draw] = self._of_row(noise, both)
        return found

    @torch.no_grad()
    def _of_row(self, noise: torch.Tensor, states: torch.Tensor) -> float:
        """Return the sharpness on noise [C, H, W] with the states of the prompt and of no prompt, [2, K, D]."""

        def score_difference(x: torch.Tensor) -> torch.Tensor:
            cond, uncond = self._unet(x.expand(2, *x.shape), torch.full((2,), self._timestep), states)
            difference: torch.Tensor = self._scale * (cond - uncond)
            return difference

        derivative: torch.Tensor = torch.func.jvp(score_difference, (noise,), (score_difference(noise),))[1]
        return float(derivative.double().norm())

    def _download(self, states: States) -> torch.Tensor:
        return torch.from_numpy(self._engine.backend.memory.download(states.tensor))
