"""From what the user names to a checkpoint."""

from pathlib import Path

from memedge.export.checkpoint import Checkpoint
from memedge.export.optimum import OptimumCheckpoint, is_optimum
from memedge.export.parts import load_parts
from memedge.export.torch_checkpoint import TorchCheckpoint


def load_checkpoint(model: str) -> Checkpoint:
    """Load a checkpoint; raises ExportError if it is none that memedge knows, or damaged."""
    if is_optimum(Path(model)):
        return OptimumCheckpoint(Path(model))
    return TorchCheckpoint(load_parts(model))
