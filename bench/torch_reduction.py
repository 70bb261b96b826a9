"""The reduction as one would write it in torch: what both reductions of ours are compared with."""

import torch

Pair = tuple[torch.Tensor, torch.Tensor]  # norm and cosine over channels, [R] each


def torch_eager(cond: torch.Tensor, uncond: torch.Tensor) -> Pair:
    """As a user of torch would."""
    u = uncond.float()
    delta = cond.float() - u
    channel = torch.nn.functional.cosine_similarity(u, delta, dim=1).mean(dim=(1, 2))
    return delta.flatten(1).norm(dim=1), channel


def torch_sums(cond: torch.Tensor, uncond: torch.Tensor) -> Pair:
    """As someone would who found `cosine_similarity` slow here."""
    u = uncond.float()
    delta = cond.float() - u
    squared = delta.square()
    norms = u.square().sum(1).sqrt().clamp_min(1e-8) * squared.sum(1).sqrt().clamp_min(1e-8)
    return squared.sum((1, 2, 3)).sqrt(), ((u * delta).sum(1) / norms).mean(dim=(1, 2))
