"""Zero the weights that memorized prompts use more than clean ones do (Chavhan et al., 2024), in small.

The score of a weight is |W_ij| · ‖X_j‖₂, as Wanda's (Sun et al., 2024), X_j being what the second linear layer of a
transformer block's feed-forward part is given by channel j over all places, prompts and steps that are looked at. A
weight is zeroed if its score over memorized prompts is among its row's top share, and higher than its score over clean
prompts. Its code was never released; what it does is in the paper alone.

What differs from the paper, or isn't said there: X is of generations without guidance, and is looked at in the first
STEPS of 50 DDIM steps, one draw of noise a prompt; clean prompts are as many as memorized ones, so that norms compare.
"""

import torch
from generate import noise
from model import Model, scheduler

STEPS = 10  # of 50
SHARE = 0.3  # swept: bench/tiny/README.md


def layers(model: Model) -> dict[str, torch.nn.Linear]:
    """Return the second linear layer of each feed-forward part."""
    return {name: layer for name, layer in model.unet.named_modules() if name.endswith("ff.net.2")}


@torch.inference_mode()
def norms(model: Model, states: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return ‖X_j‖₂ of what each layer is given, [channels], while embeddings [P, L, D] are generated from."""
    squares: dict[str, torch.Tensor] = {}

    def adding(name: str):  # type: ignore[no-untyped-def]
        def add(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
            squares[name] = squares.get(name, torch.zeros(())) + given[0].square().sum((0, 1))

        return add

    hooks = [layer.register_forward_pre_hook(adding(name)) for name, layer in layers(model).items()]
    latent, ddim = noise(range(len(states))), scheduler()
    ddim.set_timesteps(50)
    for t in ddim.timesteps[:STEPS]:
        latent = ddim.step(model.unet(latent, t, states).sample, t, latent).prev_sample
    for hook in hooks:
        hook.remove()
    return {name: some.sqrt() for name, some in squares.items()}


def zero(model: Model, memorized: torch.Tensor, clean: torch.Tensor, share: float) -> tuple[int, int]:
    """Zero weights, by embeddings [P, L, D] of both; return how many, and of how many.

    Args:
        model: whose UNet is changed.
        memorized: the prompts that are to be forgotten.
        clean: as many others.
        share: of a row's weights, at most.
    """
    high, low, zeroed, total = norms(model, memorized), norms(model, clean), 0, 0
    for name, layer in layers(model).items():
        weight = layer.weight.data
        score, other = weight.abs() * high[name], weight.abs() * low[name]
        top = torch.zeros_like(weight, dtype=torch.bool)
        top.scatter_(1, score.topk(round(share * weight.shape[1]), dim=1).indices, True)
        chosen = top & (score > other)
        weight[chosen] = 0
        zeroed, total = zeroed + int(chosen.sum()), total + chosen.numel()
    return zeroed, total
