"""Columns of scores for the batches of data frameworks: Ray Data, Spark, Daft, datasets (docs/frameworks.md).

Nothing here needs any of them; memedge/integrations/ray_cluster.py runs `memedge score --ray`.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from memedge.detector import Detector
from memedge.engine.errors import InputError
from memedge.prompts.text import checked_prompts
from memedge.tables import DTYPES, Columns

NAMES = ("norm", "alignment", "score", "memorized", "truncated")


class ScorePrompts:
    """Adds norm, alignment, score, memorized and truncated to a batch; for `map_batches` and its like.

    It can be pickled, as a detector can: the engine is opened once where it arrives.
    """

    def __init__(self, detector: Detector, column: str = "prompt"):
        """Take what scores, and the name of the column of prompts."""
        self._detector = detector
        self._column = column

    def __call__(self, batch: Any) -> Any:
        """Return the batch with five columns more, of the same kind; equal prompts are scored once.

        Columns have one type in all batches. Where the engine is not calibrated, score and memorized hold nulls of it:
        None in lists, NaN and None in NumPy's arrays.

        Args:
            batch: B rows: a mapping of NumPy arrays or of lists, a pyarrow.Table or a pandas.DataFrame.

        Raises:
            InputError: another kind of batch, no such column, one that is named like one of the five, or a row without
                text.
            NotFiniteError: the model produced NaN or infinity.
        """
        add, names = _kind(batch)
        if self._column not in names:
            others = ", ".join(map(repr, names)) or "none"
            raise InputError(f"The batch has no column {self._column!r} but {others}: name the one that holds prompts.")
        if taken := [name for name in NAMES if name in names]:
            raise InputError(f"The batch has a column {taken[0]!r} already: rename or drop it first.")
        prompts = _texts(batch, self._column)
        if not prompts:
            return add(batch, {name: [] for name in NAMES})  # as data frameworks try out what a function returns
        first = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        known = self._detector.score(list(first)).to_dict()
        return add(batch, {name: [known[name][first[prompt]] for prompt in prompts] for name in NAMES})


def _kind(batch: Any) -> tuple[Callable[[Any, Columns], Any], list[str]]:
    """Return the function that adds columns to a batch of this kind, and the names of its columns."""
    # Their own modules are loaded wherever there is such a batch.
    if (arrow := sys.modules.get("pyarrow")) and isinstance(batch, arrow.Table):
        return _add_to_arrow, batch.column_names
    if (pandas := sys.modules.get("pandas")) and isinstance(batch, pandas.DataFrame):
        return _add_to_pandas, list(batch.columns)
    if isinstance(batch, Mapping):
        return _add_to_mapping, list(batch)
    raise InputError(
        f"A batch is {type(batch).__name__}: give a mapping of NumPy arrays or lists, a pyarrow.Table or a "
        "pandas.DataFrame."
    )


def _texts(batch: Any, column: str) -> list[str]:
    """Return a column as strings, each checked to be text."""
    values = batch[column]
    values = values.to_pylist() if hasattr(values, "to_pylist") else list(values)
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str):
            raise InputError(
                f"Row {row} of the batch has {type(value).__name__} for text in column {column!r}: "
                "drop such rows first."
            )
    return list(checked_prompts(values))


def _add_to_mapping(batch: Any, columns: Columns) -> dict[str, Any]:
    if any(isinstance(values, np.ndarray) for values in batch.values()):
        return {**batch, **{name: _array(name, values) for name, values in columns.items()}}
    return {**batch, **columns}


def _array(name: str, values: list[Any]) -> "np.ndarray[Any, np.dtype[Any]]":
    if DTYPES.get(name) == "float64":
        return np.array(values, dtype=np.float64)  # None becomes NaN
    # Of the two truth values only `memorized` can lack: then all of it does.
    return np.array(values, dtype=object if None in values else np.bool_)


def _add_to_arrow(batch: Any, columns: Columns) -> Any:
    import pyarrow

    for name, values in columns.items():
        kind = pyarrow.float64() if DTYPES.get(name) == "float64" else pyarrow.bool_()
        batch = batch.append_column(name, pyarrow.array(values, kind))
    return batch


def _add_to_pandas(batch: Any, columns: Columns) -> Any:
    import pandas

    kinds = {name: DTYPES.get(name, "bool") for name in NAMES}
    return batch.assign(**{name: pandas.array(values, dtype=kinds[name]) for name, values in columns.items()})
