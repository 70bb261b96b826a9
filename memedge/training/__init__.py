"""Fine-tuning that does not memorize: samples that a model already prints are left out. Needs torch (extra `train`)."""

from memedge.engine.errors import not_installed

try:
    from memedge.training.filter import MemorizationFilter
except ModuleNotFoundError as error:
    raise ImportError(not_installed("memedge.training", error, "train")) from error

__all__ = ["MemorizationFilter"]
