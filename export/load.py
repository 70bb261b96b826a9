"""From what the user names to a checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path

from memedge.engine.errors import ExportError
from memedge.export.checkpoint import Checkpoint
from memedge.export.optimum import OptimumCheckpoint, is_optimum
from memedge.export.sources import load_parts
from memedge.export.torch_checkpoint import TorchCheckpoint


def load_checkpoint(
    model: str,
    *,
    revision: str | None = None,
    loras: Sequence[str] = (),
    allow_pickle: bool = False,
    config: str | None = None,
    progress: Callable[[str], None] = lambda _phase: None,
) -> Checkpoint:
    """Load a checkpoint; the arguments are those of sources.load_parts.

    Raises:
        ExportError: it is none that memedge knows, or damaged.
    """
    if is_optimum(Path(model)):
        if revision is not None or loras or config is not None:
            raise ExportError(
                f"{model} is what Optimum exported, which has no revision and needs no config, and LoRAs can't be "
                "fused into it: leave them out, or give the model that was exported."
            )
        return OptimumCheckpoint(Path(model))
    parts = load_parts(
        model, revision=revision, loras=loras, allow_pickle=allow_pickle, config=config, progress=progress
    )
    return TorchCheckpoint(parts)
