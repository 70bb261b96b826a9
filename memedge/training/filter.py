"""The training-time filter of Wen et al.: samples that their caption predicts too strongly are not learnt from."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memedge.engine.errors import InputError, NotFiniteError


class MemorizationFilter:
    """Says which samples of a training batch to learn from: those whose ‖Δ‖₂ is under a target (docs/methods.md §2).

    Δ = ε_c − ε_0 of the model as it is now, on each sample's own noisy latents and timestep. ε_0 is one more pass of
    the UNet, without gradients. The UNet is only ever called, so it may be wrapped, as accelerate and DDP do.
    Source: Wen et al., ICLR 2024.

    Attributes:
        target: the targets, float32, [] or [timesteps].

    Examples:
        >>> import torch
        >>> from memedge.training import MemorizationFilter
        >>> memorization = MemorizationFilter(unet, target=2.0)
        >>> noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([981, 41])
        >>> keep = memorization.mask(noisy, timesteps, states, empty)
        >>> keep.dtype, keep.shape
        (torch.bool, torch.Size([2]))
    """

    def __init__(self, unet: torch.nn.Module, target: float | Sequence[float] | torch.Tensor, scheduler: Any = None):
        """Keep the model; nothing is computed yet.

        Args:
            unet: the UNet that is trained, called as diffusers' UNet2DConditionModel is. Where it is wrapped, give the
                wrapped one.
            target: the norm from which a sample is left out, above 0: one, or one for each timestep, [timesteps];
                infinity keeps every sample. It belongs to one model and one size of picture: docs/training.md says
                where to get it.
            scheduler: the training loop's, of diffusers. It says what the model predicts, and has ᾱ; it is read at each
                batch. Without one, the model predicts ε.

        Raises:
            InputError: what is no model, no target or no such scheduler.
        """
        if not isinstance(unet, torch.nn.Module):
            raise InputError(f"MemorizationFilter takes a UNet, a torch.nn.Module, not {type(unet).__name__}.")
        if scheduler is not None and not hasattr(scheduler, "alphas_cumprod"):
            raise InputError(f"A {type(scheduler).__name__} has no alphas_cumprod: give the training loop's scheduler.")
        self.target = _target(target)
        self._unet, self._scheduler = unet, scheduler
        configs = (getattr(module, "config", None) for module in unet.modules())
        self._pooled = any(getattr(config, "addition_embed_type", None) == "text_time" for config in configs)

    def mask(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        states: torch.Tensor,
        empty: torch.Tensor,
        *,
        prediction: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return which samples to keep, bool [B]: True is under the target, and False is to be left out.

        Args and errors are those of `norm`; a target for each timestep is that of the sample's.
        """
        norm = self.norm(noisy, timesteps, states, empty, prediction=prediction, added_cond_kwargs=added_cond_kwargs)
        return norm < (_at(self.target, timesteps, "target") if self.target.ndim else self.target)

    def norm(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        states: torch.Tensor,
        empty: torch.Tensor,
        *,
        prediction: torch.Tensor | None = None,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Return ‖Δ‖₂ of each sample, float32 [B], in ε, without gradients. Targets are made of these.

        Args:
            noisy: noisy latents as the UNet is given them, [B, C, H, W].
            timesteps: each sample's, integers [B].
            states: its caption's embeddings, [B, L, D].
            empty: those of the empty caption, [1, L, D].
            prediction: the UNet's output for `noisy`, `timesteps` and `states`, [B, C, H, W], which a training loop has
                already; its gradients stay as they are. Without it there is a second pass.
            added_cond_kwargs: for SDXL, those of the empty caption: pooled embeddings and time ids. `prediction` is
                needed then.

        Raises:
            InputError: tensors that do not fit together, or a scheduler of another kind of model.
            NotFiniteError: NaN or infinity in the model's predictions.
        """
        _check(noisy, timesteps, states, empty)
        if self._pooled and (prediction is None or added_cond_kwargs is None):
            raise InputError(
                "SDXL's UNet takes more than states: give its output as prediction, and the empty caption's pooled "
                "embeddings with the batch's time ids as added_cond_kwargs."
            )
        with torch.no_grad():
            cond = self._predict(noisy, timesteps, states, None) if prediction is None else prediction
            uncond = self._predict(noisy, timesteps, empty.expand(len(noisy), -1, -1), added_cond_kwargs)
            # Within autocast, torch keeps weights that it has rounded. In older torch those of a pass without gradients
            # have none in the pass after, which is learnt from (pytorch/pytorch issue 112583; not so in 2.13).
            torch.clear_autocast_cache()
            if cond.shape != uncond.shape:
                raise InputError(
                    f"prediction is the UNet's output for noisy, {list(uncond.shape)}, not {list(cond.shape)}."
                )
            delta = cond.float() - uncond.float()
            norm: torch.Tensor = torch.linalg.vector_norm(delta, dim=(1, 2, 3)) * self._factor(timesteps)
        if not torch.isfinite(norm).all():
            raise NotFiniteError("The model's predictions hold NaN or infinity: training has diverged, or overflows.")
        return norm

    def _predict(
        self,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        states: torch.Tensor,
        added: Mapping[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        more = {} if added is None else {"added_cond_kwargs": dict(added)}
        prediction: torch.Tensor = self._unet(noisy, timesteps, states, return_dict=False, **more)[0]
        return prediction

    def _factor(self, timesteps: torch.Tensor) -> torch.Tensor | float:
        """Return what ‖Δ‖ of the predictions is multiplied by to be that of ε: 1, or √ᾱ of each sample's timestep."""
        # Read here, because diffusers' script sets it within its loop.
        predicted = "epsilon" if self._scheduler is None else self._scheduler.config.prediction_type
        if predicted == "epsilon":
            return 1.0
        if predicted != "v_prediction":
            raise InputError(f"MemorizationFilter is for models that predict ε or v, not {predicted!r}.")
        return _at(self._scheduler.alphas_cumprod, timesteps, "ᾱ").float().sqrt()


def _check(noisy: torch.Tensor, timesteps: torch.Tensor, states: torch.Tensor, empty: torch.Tensor) -> None:
    if noisy.ndim != 4 or not len(noisy):
        raise InputError(f"noisy is latents [B, C, H, W], not {list(noisy.shape)}.")
    batch = len(noisy)
    if timesteps.shape != (batch,) or timesteps.is_floating_point():
        raise InputError(
            f"timesteps are {batch} integers, one for each sample, not {timesteps.dtype} {list(timesteps.shape)}."
        )
    if states.ndim != 3 or len(states) != batch:
        raise InputError(f"states are [{batch}, L, D], one for each sample, not {list(states.shape)}.")
    if empty.shape != (1, *states.shape[1:]):
        raise InputError(
            f"empty is the empty caption's states, {[1, *states.shape[1:]]}, not {list(empty.shape)}: encode it as the "
            "captions are, padded to their length."
        )


def _at(table: torch.Tensor, timesteps: torch.Tensor, what: str) -> torch.Tensor:
    """Return the table's value at each timestep."""
    lowest, highest = int(timesteps.min()), int(timesteps.max())
    if lowest < 0 or highest >= len(table):
        raise InputError(
            f"There is a {what} for timesteps 0 to {len(table) - 1}, and samples have {lowest} to {highest}: give one "
            "for each timestep of the training loop's scheduler."
        )
    return table.to(timesteps.device)[timesteps]


def _target(value: float | Sequence[float] | torch.Tensor) -> torch.Tensor:
    try:
        target = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):  # no numbers
        target = torch.tensor(0.0)
    if target.ndim > 1 or not target.numel() or not bool((target > 0).all()):
        raise InputError("target is a norm above 0, or one for each timestep: docs/training.md says where to get it.")
    return target
