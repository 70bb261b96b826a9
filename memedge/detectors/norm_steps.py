"""The norm over the first steps of generation (Wen et al., ICLR 2024; docs/methods.md §2)."""

from collections.abc import Sequence

import numpy as np

from memedge.detectors.ddim import GUIDANCE, guided, plan
from memedge.detectors.draws import Draws, per_block
from memedge.engine.arrays import Floats
from memedge.engine.denoiser import Denoiser, norms
from memedge.engine.engine import States


class NormOverSteps:
    """mean over the first k steps of ‖ε_c − ε_0‖₂, along DDIM (η = 0, guidance 7.5, the engine's 50 steps).

    With k = 1 it is the product's norm if the model predicts ε. One that predicts v is measured in ε, too: at the first
    step that is (1 − ᾱ) times the product's norm.

    Cost: 2k − 1 passes per prompt and draw; ε_0 of the first step is the same for all prompts.
    """

    def __init__(self, denoiser: Denoiser, draws: int, seed: int | None, count: int):
        """`count` is k; where ᾱ = 0 at the noisiest timestep (ddim.plan), there is one step less."""
        self._denoiser = denoiser
        self._steps = plan(denoiser.manifest.schedule)[:count]
        self._first = Draws(denoiser, denoiser.noise(draws, seed), self._steps[0].timestep)
        self.name = f"norm-{count}"
        self.formula = (
            f"mean of ‖ε_c − ε_0‖₂ over the first {len(self._steps)} DDIM steps with guidance {GUIDANCE} "
            "(Wen et al. 2024)"
        )
        self.passes = 2.0 * len(self._steps) - 1

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._denoiser.engine, prompts, len(self._first.noise), self._score)

    def _score(self, states: States) -> Floats:
        path = guided(self._denoiser, states, self._first, self._steps)
        mean: Floats = np.mean([norms(cond - uncond) for cond, uncond, _ in path], axis=0)
        return mean.reshape(len(states.empty), -1)
