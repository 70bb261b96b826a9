"""The UNet on any latents and timestep, for detectors that move or denoise the noise (docs/methods.md §2 to §4)."""

import numpy as np
import numpy.typing as npt

from memedge.engine.arrays import Floats, Indices
from memedge.engine.directory import PREFIX
from memedge.engine.engine import Engine, States
from memedge.engine.errors import InputError, NotFiniteError, ProviderError
from memedge.engine.memory import Tensor, part
from memedge.engine.native import CALLS
from memedge.engine.providers import check_other_latents

Latents = npt.NDArray[np.float32]


class Denoiser:
    """ε of an engine's UNet at any latents and timestep, in its provider and precision. Safe to call from any thread.

    What the engine caches for its own noise is computed for each call, so a pass costs a little more. A model that
    predicts v gives ε too: ε = √ᾱ v + √(1 − ᾱ) x. A flow-matching one gives what its graph does (Manifest), at the
    engine's two timesteps alone.

    Attributes:
        engine: the engine, which encodes prompts.
        manifest: the engine's; its `schedule` has the timesteps, and ᾱ at each.
    """

    def __init__(self, engine: Engine):
        """Take an opened engine.

        Raises:
            ProviderError: an int8 engine, or a provider that computes on the engine's own noise only.
        """
        self.engine = engine
        self.manifest = engine.directory.manifest
        if PREFIX not in self.manifest.files:
            raise ProviderError(
                f"{engine.directory.path} is an {self.manifest.precision} engine, which computes on its own noise "
                "only, and this needs other latents: export one in fp32 or fp16."
            )
        check_other_latents(engine.backend.provider)
        self._empty = engine.encode(engine.tokenize([""])[0])
        schedule = self.manifest if self.manifest.prediction_type == "flow" else self.manifest.schedule
        self._alpha = dict(zip(schedule.timesteps, schedule.alphas_cumprod, strict=True))
        # Loads now what would otherwise be loaded within the first call.
        self.uncond(self.noise(1), self.manifest.timesteps[0])

    def noise(self, draws: int, seed: int | None = None) -> Latents:
        """Return that many draws of pure noise, float32 [draws, C, H, W].

        Args:
            draws: at least 1.
            seed: None: the engine's own draws first, then NumPy's from the manifest's seed. Else all are NumPy's, from
                this seed.
        """
        if draws < 1:
            raise InputError(f"draws is {draws}: give at least 1.")
        own = self.engine.directory.baseline.sample[: draws if seed is None else 0]
        generator = np.random.default_rng(self.manifest.seed if seed is None else seed)
        further = generator.standard_normal((draws - len(own), *self.manifest.latent_shape), dtype=np.float32)
        return np.concatenate([own, further])

    def predict(
        self, states: States, prompts: Indices, latents: Latents, timestep: int, guidance: float | None = None
    ) -> Latents:
        """Return ε_c, float32 [R, C, H, W]: row r is of prompt prompts[r] on latents[r].

        Args:
            states: the embeddings of B prompts.
            prompts: int64 [R], each below B.
            latents: float32 [R, C, H, W].
            timestep: one of the schedule's.
            guidance: the scale that a distilled model is told; default: the manifest's.

        Raises:
            InputError: a timestep that is not in the schedule, or a scale for a model that is told none.
            NotFiniteError: ε holds NaN or infinity.
        """
        if guidance is not None and self.manifest.guidance is None:
            raise InputError(f"The model of {self.engine.directory.path} is told no guidance scale: leave it out.")
        return self._rows(states, prompts, latents, timestep, guidance, with_uncond=False)[0]

    def uncond(self, latents: Latents, timestep: int) -> Latents:
        """Return ε_0, float32 [R, C, H, W], on latents [R, C, H, W]; raises as `predict`."""
        return self.predict(self._empty, np.zeros(len(latents), dtype=np.int64), latents, timestep)

    def guidance(self, states: States, prompts: Indices, latents: Latents, timestep: int) -> tuple[Latents, Latents]:
        """Return ε_c and ε_0 of each row, as `predict` and `uncond`: two passes per row. The empty prompt's equal."""
        cond, uncond = self._rows(states, prompts, latents, timestep, None, with_uncond=True)
        empty = states.empty[prompts]
        cond[empty] = uncond[empty]
        return cond, uncond

    def _rows(
        self,
        states: States,
        prompts: Indices,
        latents: Latents,
        timestep: int,
        guidance: float | None,
        *,
        with_uncond: bool,
    ) -> tuple[Latents, Latents]:
        """Return ε_c, and ε_0 if asked for."""
        alpha = self._alpha.get(timestep)
        if alpha is None:
            known = ", ".join(map(str, self._alpha))
            raise InputError(f"Timestep {timestep} is none of the engine's schedule: take one of {known}.")
        told = self.manifest.guidance if guidance is None else guidance
        backend, kinds = self.engine.backend, 1 + with_uncond
        # The UNet holds 2n latents at once.
        most = min(self.engine.passes, max(1, self.engine.rows_per_call // kinds))
        found = np.empty((kinds, *latents.shape), dtype=np.float32)
        for start in range(0, len(latents), most):
            block = slice(start, start + most)
            unique, prompt = np.unique(prompts[block], return_inverse=True)
            tensor = self._take(states, unique, with_uncond)
            row = np.arange(len(prompt))
            if with_uncond:
                prompt, row = np.concatenate([prompt, np.full_like(prompt, len(unique))]), np.tile(row, 2)
            count, prompt, row = len(row), self.engine.filled(prompt), self.engine.filled(row)
            given = latents[block]
            if backend.one_shape:
                given = np.pad(given, [(0, most - len(given)), (0, 0), (0, 0), (0, 0)], mode="edge")
            with CALLS:
                output = backend.predict_at(tensor, prompt, row, given, timestep, told)
                found[:, block] = backend.memory.download(output)[:count].reshape(kinds, -1, *latents.shape[1:])
        if bad := int((~np.isfinite(found)).any(axis=(0, 2, 3, 4)).sum()):
            raise NotFiniteError(
                f"The predictions on {bad} of {len(latents)} latents hold NaN or infinity: run the model in a higher "
                "precision."
            )
        if self.manifest.prediction_type == "v_prediction":
            found = np.float32(alpha**0.5) * found + np.float32((1 - alpha) ** 0.5) * latents
        return found[0], found[-1]

    def _take(self, states: States, unique: Indices, with_empty: bool) -> Tensor:
        """Return the states of some prompts, and the empty prompt's behind them if asked for."""
        memory, tensor = self.engine.backend.memory, states.tensor
        chosen = memory.empty((len(unique) + with_empty, *tensor.shape[1:]), tensor.dtype)
        for place, prompt in enumerate(unique):
            memory.copy(part(tensor, int(prompt), 1), part(chosen, place, 1))
        if with_empty:
            memory.copy(self._empty.tensor, part(chosen, len(unique), 1))
        return chosen


def norms(values: npt.NDArray[np.floating]) -> Floats:
    """Return the L2 norm over C, H, W of [..., C, H, W], computed in float64."""
    flat = values.reshape(*values.shape[:-3], -1).astype(np.float64)
    found: Floats = np.linalg.norm(flat, axis=-1)
    return found
