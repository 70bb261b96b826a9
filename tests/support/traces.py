"""Graphs traced in this run: exports of the same modules share one trace, which is most of their time.

A trace of other modules would not agree with them, and no export would pass its own comparison with torch.
"""

import hashlib
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from memedge.export.sources import torch_checkpoint

_kept: dict[str, ir.Model] = {}


def share(monkeypatch: Any) -> None:
    """Let exports in this process take traces from those before."""
    trace = torch_checkpoint.trace

    def traced(graph: nn.Module, example: dict[str, torch.Tensor], *rest: Any) -> ir.Model:
        key = identity(graph, {name: value.shape for name, value in example.items()})
        if key not in _kept:
            _kept[key] = trace(graph, example, *rest)
        return _kept[key].clone()  # which export rewrites in place

    monkeypatch.setattr(torch_checkpoint, "trace", traced)


def identity(graph: nn.Module, *rest: object) -> str:
    """Return a hash of a module, with its weights, and of what else its graph depends on."""
    digest = hashlib.sha256(f"{graph} {rest}".encode())
    for name, value in graph.state_dict().items():
        digest.update(f"{name} {value.dtype} {value.shape}".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()
