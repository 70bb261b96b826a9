"""From what the user names to a checkpoint."""

from memedge.export.checkpoint import Checkpoint
from memedge.export.parts import load_parts
from memedge.export.torch_checkpoint import TorchCheckpoint


def load_checkpoint(model: str) -> Checkpoint:
    """Load a checkpoint; raises ExportError if it is none that memedge knows, or damaged."""
    return TorchCheckpoint(load_parts(model))
