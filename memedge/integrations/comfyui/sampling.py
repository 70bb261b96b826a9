"""What ComfyUI's samplers say of a model's predictions, as the predictions themselves."""

from typing import Any, Literal, NamedTuple

from comfy.model_sampling import CONST, EDM, EPS, V_PREDICTION, X0, ModelSamplingDiscrete

from memedge.engine.errors import InputError

TIMESTEPS = 1000  # that Stable Diffusion's models are trained on: all that steering was measured on
Kind = Literal["epsilon", "v_prediction", "flow"]


class Halves(NamedTuple):
    """x_t and both predictions, torch [B, C, H, W], as the model itself has them."""

    x: Any
    cond: Any
    uncond: Any


def kind_of(model_sampling: Any) -> Kind:
    """Return what a model of ComfyUI's predicts: noise, v, or a flow's velocity.

    Raises:
        InputError: something else.
    """
    if isinstance(model_sampling, CONST):
        return "flow"
    if isinstance(model_sampling, EPS) and not isinstance(model_sampling, X0 | EDM):
        return "v_prediction" if isinstance(model_sampling, V_PREDICTION) else "epsilon"
    raise InputError(
        "This model predicts neither noise, nor v, nor a flow's velocity, so its guidance isn't known: remove the "
        "Memorization Gate."
    )


def halves(kind: Kind, x: Any, sigma: float, cond: Any, uncond: Any) -> Halves:
    """Return the predictions that ComfyUI made denoised images of.

    For models of noise its x is x_0 + σ ε, and so a denoised image x − σ ε; the model sees x_t = x / √(1 + σ²), with
    ᾱ = 1 / (1 + σ²). For flows x is (1 − σ) x_0 + σ ε, and a denoised image x − σ v.

    Args:
        kind: what the model predicts.
        x: the sampler's, torch [B, C, H, W].
        sigma: its noise.
        cond: what is denoised with the prompt, in x's shape.
        uncond: what is denoised without.
    """
    predicted = ((x - cond) / sigma, (x - uncond) / sigma)
    if kind == "flow":
        return Halves(x, *predicted)
    root = (1 + sigma**2) ** 0.5  # 1 / √ᾱ; √(1 − ᾱ) is σ times √ᾱ
    if kind == "v_prediction":  # ε = √ᾱ v + √(1 − ᾱ) x_t
        predicted = (root * predicted[0] - sigma / root * x, root * predicted[1] - sigma / root * x)
    return Halves(x / root, *predicted)


def sigma_at(model_sampling: Any, timestep: int) -> float | None:
    """Return σ at a training timestep, or None for a model that has not the 1000 of Stable Diffusion's."""
    import torch

    if not isinstance(model_sampling, ModelSamplingDiscrete) or len(model_sampling.sigmas) != TIMESTEPS:
        return None
    return float(model_sampling.sigma(torch.tensor(timestep)))
