"""The norm of the guidance in a pipeline's own first step: no pass of the UNet is added (docs/methods.md §5)."""

import threading
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError
from memedge.engine.manifest import PredictionType
from memedge.guidance import guidance_stats


class AllOver(Exception):  # noqa: N818
    """Every prompt's norm is over the threshold, so that no further step is worth its time."""


class FirstStep:
    """Within `with`, watches a pipeline's UNet for its first call.

    Only calls by the thread that entered count: another thread's pipeline may share the UNet.

    Attributes:
        norms: float64 [B], each prompt's mean of ‖Δ‖₂ over its images, in ε; None before the first call.
        timestep: that of the first call.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: int,
        images: int,
        prediction_type: PredictionType,
        *,
        empty: tuple[Any, Any] | None = None,
        stop_at: float | None = None,
    ):
        """Take a pipeline that is to generate `images` images of each of the prompts.

        Args:
            empty: the empty prompt's embeddings, torch [B, L, D], and pooled ones, [B, P] or None, where a negative
                prompt is given: ε_0 is then computed of them, in a further call. Else it is half of the first call.
            stop_at: if no norm is under it, AllOver is raised from the first call.
        """
        self._pipe, self._prompts, self._images, self._empty = pipe, prompts, images, empty
        self._prediction_type, self._stop_at = prediction_type, stop_at
        self.norms: npt.NDArray[np.float64] | None = None
        self.timestep = 0.0

    def __enter__(self) -> "FirstStep":
        self._thread = threading.get_ident()
        self._called = False
        self._hook = self._pipe.unet.register_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _see(self, _unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take the norms of the two halves of a call's output, [ε_0; ε_c], in the order of diffusers."""
        if self._called or threading.get_ident() != self._thread:
            return
        self._called = True
        predictions, prompts, images = output[0].detach(), self._prompts, self._images
        if len(predictions) != 2 * prompts * images:
            raise InputError(
                f"The UNet's first call had {len(predictions)} rows for {prompts * images} images, not two for each: "
                "first_step needs classifier-free guidance in one call; leave it out to have the prompts scored."
            )
        self.timestep = float(args[1] if len(args) > 1 else kwargs["timestep"])
        # To the host, some hundred kilobytes, on which the step waits for its verdict anyhow: so any device will do.
        uncond, cond = predictions.contiguous().cpu().chunk(2)
        if self._empty is not None:
            uncond = self._unconditional(self._empty, args, kwargs).contiguous().cpu()
        stats = guidance_stats(cond, uncond, prediction_type=self._prediction_type, alpha_cumprod=self._alpha_cumprod())
        self.norms = stats.norm.reshape(prompts, images).mean(1)
        if self._stop_at is not None and (self.norms >= self._stop_at).all():
            raise AllOver

    def _unconditional(self, empty: tuple[Any, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return ε_0 of the empty prompt where the first call's first half is of a negative prompt; [B · images, …].

        A prompt that is its own negative one has no Δ between them, and is generated all the same.
        """
        import torch

        states = empty[0].repeat_interleave(self._images, dim=0)
        half = len(states)
        more = dict(kwargs, encoder_hidden_states=states)
        if empty[1] is not None:
            pooled, added = empty[1].repeat_interleave(self._images, dim=0), kwargs["added_cond_kwargs"]
            more["added_cond_kwargs"] = dict(added, text_embeds=pooled, time_ids=added["time_ids"][half:])
        with torch.no_grad():
            return self._pipe.unet(args[0][half:], *args[1:], **more)[0].detach()

    def measured(self) -> npt.NDArray[np.float64]:
        """Return `norms`; raises InputError if no call was seen, as of what is in a UNet's place and has no hooks."""
        if self.norms is None:
            raise InputError(
                "The UNet's first call could not be seen, as its hooks did not run: leave first_step out to have the "
                "prompts scored."
            )
        return self.norms

    def _alpha_cumprod(self) -> float | None:
        """Return ᾱ at the timestep, which may lie between two trained ones; None where it is not needed."""
        if self._prediction_type == "epsilon":
            return None
        trained = self._pipe.scheduler.alphas_cumprod.double().cpu().numpy()
        alpha = float(np.interp(self.timestep, np.arange(len(trained)), trained))
        if not 0 < alpha < 1:
            raise InputError(
                f"At the first step, timestep {self.timestep:g}, the latents hold no signal (zero terminal SNR), so "
                "the norm says nothing there: leave first_step out to have the prompts scored."
            )
        return alpha
