"""The norm of what the guidance scale changes, for models that are told it (docs/methods.md §9)."""

from collections.abc import Sequence

from memedge.detectors.anisotropy import norm_scale
from memedge.detectors.draws import per_block, rows
from memedge.engine.arrays import Floats
from memedge.engine.denoiser import Denoiser, norms
from memedge.engine.engine import States
from memedge.engine.errors import InputError

NONE = 1.0  # the scale at which guided predictions are ε_c


class NormOverGuidance:
    """‖ε_c(g) − ε_c(1)‖₂ / |g − 1| at the noisiest timestep, where g is the scale that the engine's model is told.

    A student that was distilled of guided predictions ε_0 + g (ε_c − ε_0) gives these: the difference is then that
    of its teacher's two predictions, ‖ε_c − ε_0‖₂, which `Norm` reads off two prompts in place of two scales. Derived,
    not published. In `Norm`'s units.

    Cost: 2 passes per prompt and draw: no prompt shares a pass with another.
    """

    name = "norm-guidance"
    passes = 2.0

    def __init__(self, denoiser: Denoiser, draws: int, seed: int | None):
        """Take a model that is told a guidance scale.

        Raises:
            InputError: it isn't told any, or the engine's is 1, of which there is nothing to see.
        """
        scale, path = denoiser.manifest.guidance, denoiser.engine.directory.path
        if scale is None:
            raise InputError(
                f"Detector {self.name!r} compares two guidance scales, and the model of {path} is told none: use "
                "'norm'."
            )
        if scale == NONE:
            raise InputError(
                f"Detector {self.name!r} compares the scale that an engine's model is told with 1, and {path} is of "
                "that one: export with another --guidance."
            )
        self._denoiser, self._scale = denoiser, scale
        self._noise, self._timestep = denoiser.noise(draws, seed), denoiser.manifest.timesteps[0]
        self.formula = f"‖ε_c({scale:g}) − ε_c(1)‖₂ / {abs(scale - NONE):g} at the first timestep (docs/methods.md §9)"

    def __call__(self, prompts: Sequence[str]) -> Floats:
        return per_block(self._denoiser.engine, prompts, len(self._noise), self._score)

    def _score(self, states: States) -> Floats:
        latents, prompts = rows(self._noise, states)
        guided, plain = (
            self._denoiser.predict(states, prompts, latents, self._timestep, scale) for scale in (self._scale, NONE)
        )
        factor = norm_scale(self._denoiser.manifest) / abs(self._scale - NONE)
        found: Floats = factor * norms(guided - plain).reshape(len(states.empty), -1)
        return found
