"""Fine-tuning that does not memorize, and that forgets what a model memorized. Needs torch (extra `train`)."""

from memedge.engine.errors import not_installed

try:
    import torch  # noqa: F401 - first, so that the sentence names this package

    from memedge.training.cure_figures import Cure, CureSettings
    from memedge.training.cure_run import cure
    from memedge.training.filter import MemorizationFilter
except ModuleNotFoundError as error:
    raise ImportError(not_installed("memedge.training", error, "train")) from error

__all__ = ["Cure", "CureSettings", "MemorizationFilter", "cure"]
