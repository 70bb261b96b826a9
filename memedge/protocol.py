"""The gate as a model of the Open Inference Protocol: its name, its input, and a verdict's fields as its outputs.

`memedge serve` speaks the protocol itself (memedge/server/inference.py), and Triton does for
memedge/integrations/triton.py. https://github.com/kserve/open-inference-protocol
"""

from collections.abc import Callable
from typing import Any

from memedge.results import Verdict

NAME, VERSION = "memedge", "1"
INPUT = "prompt"  # BYTES


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


# Name → the protocol's type, NumPy's, and the field. What was not computed is NaN, which JSON has as null.
OUTPUTS: dict[str, tuple[str, str, Callable[[Verdict], Any]]] = {
    "memorized": ("BOOL", "?", lambda one: bool(one.memorized)),
    "score": ("FP64", "<f8", lambda one: _or_nan(one.score)),
    "norm": ("FP64", "<f8", lambda one: _or_nan(one.norm)),
    "alignment": ("FP64", "<f8", lambda one: _or_nan(one.alignment)),
    "threshold": ("FP64", "<f8", lambda one: _or_nan(one.threshold)),
    "truncated": ("BOOL", "?", lambda one: one.truncated),
    "passes": ("FP64", "<f8", lambda one: one.passes),
    "reason": ("BYTES", "O", lambda one: one.reason),
}
