"""The calls that a pipeline's sampler makes of its UNet or transformer, seen, and changed, by a forward hook."""

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from memedge.engine.errors import InputError
from memedge.integrations.checks import Needs
from memedge.integrations.families.find import family_of


class AllOver(Exception):  # noqa: N818
    """All images would be withheld, so that no further step is worth its time."""


class DenoiserCall:
    """One call with classifier-free guidance, whose rows are [ε_n; ε_c], in the order of diffusers; or two of a half.

    Of flow matching they are velocities, v.

    Attributes:
        timestep: the call's.
        own: ε_n, the pipeline's other half, torch [N, C, H, W]: of the empty prompt, or of a negative one.
        cond: ε_c, torch [N, C, H, W].
        latents: x_t as the denoiser was given it, torch [N, C, H, W].
    """

    def __init__(self, calls: "DenoiserCalls", args: tuple[Any, ...], kwargs: dict[str, Any], output: Any):
        """Take what the denoiser was called with, and its output."""
        self._calls, self._args, self._kwargs = calls, args, kwargs
        self._output = output.detach()
        self._changed = False
        self.own, self.cond = self._output.chunk(2)
        latents, self.timestep = calls.family.inputs(args, kwargs)
        self._first = len(latents) - len(self.cond)  # of the rows that the empty prompt's are made from
        self.latents = latents[self._first :]

    def uncond(self, rows: Sequence[int] | None = None) -> Any:
        """Return ε_0 of some images, or of all: where a negative prompt is given, by one more call for these alone.

        A prompt that is its own negative one has no Δ between them, and is generated all the same.
        """
        import torch

        empty, images, family = self._calls.empty, self._calls.images, self._calls.family
        rows = range(len(self.cond)) if rows is None else rows
        if empty is None:
            return self.own[list(rows)]
        if self._kwargs.get("mid_block_additional_residual") is not None:
            raise InputError(
                "A ControlNet reads the negative prompt too, so that the empty one's prediction, which "
                f"{self._calls.needs.what} needs, cannot be had beside it: leave the negative prompt out, or "
                f"{self._calls.needs.instead}."
            )
        half = [self._first + row for row in rows]  # conditional ones where both are there; they have the same latents
        prompts = [row // images for row in rows]
        args, kwargs = family.with_empty(self._args, self._kwargs, half, prompts, empty)
        with torch.no_grad():
            return family.predictions(family.denoiser(self._calls.pipe)(*args, **kwargs)).detach()

    def set_cond(self, rows: Sequence[int], values: Any) -> None:
        """Have the pipeline go on with other ε_c, [len(rows), C, H, W], for some images; others keep theirs."""
        if not self._changed:
            self._output, self._changed = self._output.clone(), True
        self._output[[len(self.cond) + row for row in rows]] = values.to(self._output.dtype)

    def changed(self) -> Any:
        """Return the output in which `set_cond` has set something; None if nothing was set."""
        return self._output if self._changed else None


class DenoiserCalls:
    """Within `with`, hands each call of a pipeline's UNet or transformer to functions, in turn.

    Only calls by the thread that entered count: another thread's pipeline may share the denoiser.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: int,
        images: int,
        needs: Needs,
        watchers: Sequence[Callable[[DenoiserCall], None]],
        *,
        empty: tuple[Any, Any] | None = None,
    ):
        """Take a pipeline that is to generate `images` images of each of the prompts.

        Args:
            needs: what the calls are seen for.
            watchers: what each call is handed to.
            empty: the empty prompt's embeddings, torch [B, L, D] or a list of [n, D], and pooled ones, [B, P] or None,
                where a negative prompt is given, so that the pipeline's own other half is not ε_0.
        """
        self.pipe, self.images, self.empty, self.family = pipe, images, empty, family_of(pipe)
        self._rows, self.needs, self._watchers = prompts * images, needs, watchers

    def __enter__(self) -> "DenoiserCalls":
        self._thread, self._busy, self._cond = threading.get_ident(), False, None
        self._hook = self.family.denoiser(self.pipe).register_forward_hook(self._see, with_kwargs=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _see(self, _denoiser: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        import torch

        if self._busy or threading.get_ident() != self._thread:
            return None
        if not self.family.guides(args, kwargs, self._rows):
            return None
        if len(output[0]) != (1 if self.family.apart else 2) * self._rows:
            raise InputError(
                f"The {self.family.network} was called with {len(output[0])} rows for {self._rows} images, not "
                f"{'one' if self.family.apart else 'two'} for each: {self.needs.what} needs classifier-free guidance "
                f"in one call; {self.needs.instead}."
            )
        prediction = self.family.predictions(output)
        if self.family.cond_first:
            prediction = torch.cat(prediction.chunk(2)[::-1])
        if self.family.apart:
            if self._cond is None:
                self._cond = prediction.detach()
                return None
            prediction, self._cond = torch.cat([prediction, self._cond]), None
        call = DenoiserCall(self, args, kwargs, prediction)
        self._busy = True  # what a watcher calls the denoiser for is not the sampler's
        try:
            for watcher in self._watchers:
                watcher(call)
        finally:
            self._busy = False
        changed = call.changed()
        return None if changed is None else (changed, *output[1:])
