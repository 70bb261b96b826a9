"""Keeps the model libraries' chatter (progress bars, advice, notes on exporter internals) out of our output."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings, logs and progress bars for a while; all settings are put back."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "huggingface_hub")]
    libraries = diffusers.utils.logging, transformers.utils.logging
    levels, verbosities = [logger.level for logger in loggers], [library.get_verbosity() for library in libraries]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)  # errors, too, which come as exceptions and are told as such
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.set_verbosity(verbosity)
            library.enable_progress_bar()
