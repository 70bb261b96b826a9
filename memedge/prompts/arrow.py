"""How values of parquet columns travel through Python: exactly, and without pandas.

Arrow's own conversion of times needs pandas for nanoseconds, a data base for time zones, and years from 1 to 9999. So
dates, times and durations travel as the integers that they are stored as, and extension types as what they extend; both
also within lists, structs and maps. All other values are Python's own, as `to_pylist` gives them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from memedge.prompts.kinds import import_pyarrow

_DIGITS = {"s": 0, "ms": 3, "us": 6, "ns": 9}  # of a second, by a type's unit


def travelling(kind: Any) -> Any:
    """Return the Arrow type in which values of an Arrow type travel."""
    pyarrow, _ = import_pyarrow()
    types = pyarrow.types
    if types.is_temporal(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if isinstance(kind, pyarrow.BaseExtensionType):
        return travelling(kind.storage_type)
    if types.is_struct(kind):
        return pyarrow.struct([_inner(field) for field in _fields(kind)])
    if types.is_map(kind):
        return pyarrow.map_(_inner(kind.key_field), _inner(kind.item_field), kind.keys_sorted)
    if types.is_fixed_size_list(kind):
        return pyarrow.list_(_inner(kind.value_field), kind.list_size)
    for is_such, make in (
        (types.is_list, pyarrow.list_),
        (types.is_large_list, pyarrow.large_list),
        (types.is_list_view, pyarrow.list_view),
        (types.is_large_list_view, pyarrow.large_list_view),
    ):
        if is_such(kind):
            return make(_inner(kind.value_field))
    return kind


def to_rows(batch: Any) -> list[dict[str, Any]]:
    """Return the rows of a record batch, whose values travel."""
    pyarrow, _ = import_pyarrow()
    columns = [column.cast(travelling(column.type)) for column in batch.columns]
    rows: list[dict[str, Any]] = pyarrow.RecordBatch.from_arrays(columns, batch.schema.names).to_pylist()
    return rows


def to_array(values: Any, kind: Any) -> Any:
    """Return values that travelled as an array of the Arrow type that they had."""
    pyarrow, _ = import_pyarrow()
    if any(isinstance(leaf, pyarrow.BaseExtensionType) for leaf in _leaves(kind)):
        return pyarrow.array(values, travelling(kind)).cast(kind)
    return pyarrow.array(values, kind)


def holds_bytes(kind: Any) -> bool:
    """Return whether there are bytes in values of an Arrow type."""
    name = "binary"  # in the names of all such types, and of no other but what has fields
    return any(name in str(travelling(leaf)) for leaf in _leaves(kind))


def as_text(kind: Any) -> Callable[[Any], Any] | None:
    """Return what makes text of the times within a value that travelled, or None if there are none to be.

    Dates, times and timestamps become ISO 8601, in UTC with a Z if they have a time zone; durations become ISO 8601 in
    seconds, such as PT90S.
    """
    pyarrow, _ = import_pyarrow()
    types = pyarrow.types
    if types.is_temporal(kind):
        return _time_as_text(types, kind)
    if types.is_struct(kind):
        found = {field.name: inner for field in _fields(kind) if (inner := as_text(field.type))}
        return (lambda row: {name: _each(found.get(name), value) for name, value in row.items()}) if found else None
    if types.is_map(kind):
        key, item = as_text(kind.key_type), as_text(kind.item_type)
        return (lambda pairs: [(_each(key, one), _each(item, other)) for one, other in pairs]) if key or item else None
    if not isinstance(kind, pyarrow.BaseExtensionType) and hasattr(kind, "value_field"):
        inner = as_text(kind.value_type)
        return (lambda values: [_each(inner, value) for value in values]) if inner else None
    return None


def _each(inner: Callable[[Any], Any] | None, value: Any) -> Any:
    return value if inner is None or value is None else inner(value)


def _time_as_text(types: Any, kind: Any) -> Callable[[int], str]:
    if types.is_date(kind):
        return lambda value: str(np.datetime64(value, "D"))  # parquet has no dates in milliseconds
    unit, digits = kind.unit, _DIGITS[kind.unit]
    if types.is_timestamp(kind):
        zone = "Z" if kind.tz else ""
        return lambda value: f"{np.datetime64(value, unit)}{zone}"
    if types.is_duration(kind):
        return lambda value: f"{'-' if value < 0 else ''}PT{_seconds(abs(value), digits)}S"
    return lambda value: str(np.datetime64(value, unit)).partition("T")[2]


def _seconds(value: int, digits: int) -> str:
    whole, part = divmod(value, 10**digits)
    return f"{whole}.{part:0{digits}}" if digits else str(whole)


def _inner(field: Any) -> Any:
    return field.with_type(travelling(field.type))


def _fields(kind: Any) -> list[Any]:
    return [kind.field(index) for index in range(kind.num_fields)]


def _leaves(kind: Any) -> list[Any]:
    """Return the types within an Arrow type that hold no others."""
    fields = _fields(kind)
    return [leaf for field in fields for leaf in _leaves(field.type)] if fields else [kind]
