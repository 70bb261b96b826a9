"""Rotary position embeddings in real numbers (Su et al., arXiv:2104.09864): graphs have no complex ones."""

import torch

Turns = tuple[torch.Tensor, torch.Tensor]  # what a plane's channels and each other's are multiplied by, [..., d / 2, 2]


def turns_of(cosine: torch.Tensor, sine: torch.Tensor) -> Turns:
    """Return what `turned` takes, of the angles' cosines and sines [..., d / 2]."""
    return torch.stack([cosine, cosine], dim=-1), torch.stack([-sine, sine], dim=-1)


def turned(states: torch.Tensor, turns: Turns) -> torch.Tensor:
    """Return states [R, S, heads, d], whose neighbouring channels are a plane, turned; angles are of [S] or [R, S]."""
    own, other = (one.unsqueeze(-3) for one in turns)
    pairs = torch.unflatten(states, -1, (-1, 2))
    swapped = torch.cat([pairs[..., 1:], pairs[..., :1]], dim=-1)
    found: torch.Tensor = (pairs * own + swapped * other).flatten(-2)
    return found
