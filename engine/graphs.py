"""Looking through an engine's graph before a runtime does: where its weights lie, and what it computes with.

Runtimes do more with a graph than compute: OpenVINO takes the external-data location `*/_ORT_MEM_ADDR_/*` for this
process's own memory, and a loop may never end. So what exports write is known here, field by field, and all else is
refused. Only the graph's own file is read, and its tensors are passed over. Fields are those of onnx.proto of ONNX 1.16
and newer.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from memedge.engine.errors import IntegrityError, shown
from memedge.engine.operators import OPERATORS, OPSETS
from memedge.engine.protobuf import LENGTH, VARINT, Bytes, WireError, fields, varints

LARGEST_GRAPH: Final = 2**31  # bytes; no protobuf message is larger
LARGEST_TENSOR: Final = 1 << 40  # values
MOST_DIMENSIONS: Final = 8
LARGEST_NUMBER: Final = 1 << 16  # of an attribute: runtimes may loop to it, or allocate by it
TEXT_LIMIT: Final = 256  # bytes of a name or location that is looked at

# Bytes of one value of each data type that exports store: float32, uint8, int8, int32, int64, bool, float16, float64.
ITEM_SIZES: Final = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}
EXTERNAL: Final = 1  # TensorProto.DataLocation

# The fields of each message by number, with the wire types that each may have.
_NUMBER, _CONTENT, _EITHER, _ANY = (VARINT,), (LENGTH,), (VARINT, LENGTH), (0, 1, 2, 5)
_MODEL = {1: _NUMBER, 5: _NUMBER, **dict.fromkeys((2, 3, 4, 6, 7, 8, 14), _CONTENT)}
_OPSET = {1: _CONTENT, 2: _NUMBER}
_GRAPH = dict.fromkeys((1, 2, 5, 10, 11, 12, 13, 16), _CONTENT)
_NODE = dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 9), _CONTENT)
_ATTRIBUTE = {3: _NUMBER, 8: _EITHER, 20: _NUMBER, **dict.fromkeys((1, 4, 5, 9, 13), _CONTENT), 2: _ANY, 7: _ANY}
_TENSOR = {
    **{1: _EITHER, 2: _NUMBER, 14: _NUMBER, 5: _EITHER, 7: _EITHER, 11: _EITHER, 4: _ANY, 10: _ANY},
    **dict.fromkeys((8, 9, 12, 13, 16), _CONTENT),
}
_ENTRY = {1: _CONTENT, 2: _CONTENT}
_WITH_GRAPHS, _NUMBERS = (6, 11), (3, 8)  # of an attribute
NEGATIVE: Final = 1 << 64  # -1 is written as this, less 1


class _RefusedError(ValueError):
    """What is wrong with a graph, as the end of a sentence."""


def check_graph(path: Path, sizes: Mapping[str, int]) -> None:
    """Look through an ONNX file of an engine.

    Args:
        path: of the file; its name says which operators it may hold.
        sizes: of the engine's verified files, in bytes: weights may lie in these alone.

    Raises:
        IntegrityError: it is no ONNX file, holds what no export writes, or has weights elsewhere.
    """
    try:
        with path.open("rb") as file:
            if not 0 < path.stat().st_size < LARGEST_GRAPH:
                raise _RefusedError("is empty or larger than 2 GiB")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Reader(content, OPERATORS[path.name], sizes).model()
    except WireError as error:
        raise IntegrityError(f"{path} is not an ONNX file ({error}): export the engine again.") from None
    except _RefusedError as error:
        raise IntegrityError(f"{path} {error}: do not use this engine, or export it again.") from None
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}): export the engine again.") from None


class _Reader:
    """Reads one file; `data` is all of it."""

    def __init__(self, data: Bytes, operators: frozenset[str], sizes: Mapping[str, int]):
        self._data, self._operators, self._sizes = data, operators, sizes
        self._attributes: set[bytes] = set()  # that were looked through: most are repeated

    def model(self) -> None:
        graphs = 0
        for number, begin, end in self._fields(_MODEL, "file", 0, len(self._data)):
            if number == 7:
                graphs += 1
                self._graph(begin, end)
            elif number == 8:
                self._opset(begin, end)
        if graphs != 1:
            raise _RefusedError(f"holds {graphs or 'no'} graphs instead of one")

    def _opset(self, begin: int, end: int) -> None:
        domain, versions = "", []
        for number, start, stop in self._fields(_OPSET, "opset", begin, end):
            if number == 1:
                domain = self._text(start, stop)
            else:
                versions.append(start)
        if domain not in OPSETS:
            raise _RefusedError(f"uses operators of the domain {shown(domain)!r}, which engines never do")
        if len(versions) != 1 or versions[0] not in OPSETS[domain]:
            version = versions[0] if versions else None
            raise _RefusedError(f"uses operators of version {version}, which no engine does")

    def _graph(self, begin: int, end: int) -> None:
        for number, start, stop in self._fields(_GRAPH, "graph", begin, end):
            if number == 1:
                self._node(start, stop)
            elif number == 5:
                self._tensor(start, stop, with_data_elsewhere=True)

    def _node(self, begin: int, end: int) -> None:
        operator, domain, seen = "", "", 0
        for number, start, stop in self._fields(_NODE, "node", begin, end):
            if number == 4:
                operator = self._text(start, stop)
                seen += 1
            elif number == 7:
                domain = self._text(start, stop)
                seen += 1 << 8
            elif number == 5:
                attribute = self._data[start:stop]
                if attribute not in self._attributes:
                    self._attribute(start, stop)
                    self._attributes.add(attribute)
        # Of a field that comes twice, not all readers take the same.
        if seen & 0xFF != 1 or seen >> 8 > 1:
            raise _RefusedError("holds a node without one operator")
        name = f"{domain}::{operator}" if domain else operator
        if name not in self._operators:
            raise _RefusedError(f"holds the operator {shown(name)!r}, which it never does in an engine")

    def _attribute(self, begin: int, end: int) -> None:
        for number, wire, start, stop in fields(self._data, begin, end):
            if number in _WITH_GRAPHS:
                raise _RefusedError("holds a graph within a node, which engines never do")
            if wire not in _ATTRIBUTE.get(number, ()):
                raise _RefusedError(f"holds an attribute with field {number}, which engines never have")
            if number == 5:
                self._tensor(start, stop, with_data_elsewhere=False)
            elif number in _NUMBERS:
                values = [start] if wire == VARINT else list(varints(self._data, start, stop))
                if not all(value <= LARGEST_NUMBER or value >= NEGATIVE - LARGEST_NUMBER for value in values):
                    raise _RefusedError(f"holds an attribute beyond ±{LARGEST_NUMBER}, which engines never have")

    def _tensor(self, begin: int, end: int, *, with_data_elsewhere: bool) -> None:
        """Check where a tensor's data lie, and that there are as many as its shape says."""
        shape: list[int] = []
        types: list[int] = []
        raw: list[int] = []
        elsewhere: list[tuple[int, int]] = []
        typed = external = False
        for number, wire, start, stop in fields(self._data, begin, end):
            if wire not in _TENSOR.get(number, ()):
                raise _RefusedError(f"holds a tensor with field {number}, which engines never have")
            if number == 1:
                shape += [start] if wire == VARINT else varints(self._data, start, stop)
                if len(shape) > MOST_DIMENSIONS:
                    raise _RefusedError(f"holds a tensor of more than {MOST_DIMENSIONS} dimensions")
            elif number == 2:
                types.append(start)
            elif number == 9:
                raw.append(stop - start)
            elif number == 13:
                elsewhere.append((start, stop))
            elif number == 14:
                external = external or start == EXTERNAL
            typed = typed or number in (4, 5, 7, 10, 11)
        if len(types) != 1 or types[0] not in ITEM_SIZES:
            raise _RefusedError("holds a tensor of a data type that engines never have")
        count = math.prod(shape)
        if count > LARGEST_TENSOR:
            raise _RefusedError(f"holds a tensor of {shown(str(shape))} values, more than there can be")
        size = count * ITEM_SIZES[types[0]]
        if external or elsewhere:
            if not with_data_elsewhere or raw or typed or not external:
                raise _RefusedError("holds a tensor whose data lie both in it and elsewhere, or where none should")
            self._external(elsewhere, size)
        elif len(raw) + typed > 1 or (raw and raw[0] != size) or (size and not raw and not typed):
            raise _RefusedError(f"holds a tensor of shape {shape} without its {size} bytes")

    def _external(self, entries: list[tuple[int, int]], size: int) -> None:
        """Check a tensor's external data: in a file that is listed, and within it."""
        found: dict[str, str] = {}
        for begin, end in entries:
            key = value = ""
            for number, start, stop in self._fields(_ENTRY, "external-data entry", begin, end):
                if number == 1:
                    key = self._text(start, stop)
                else:
                    value = self._text(start, stop)
            if key in found or key not in ("location", "offset", "length"):
                raise _RefusedError(f"describes external data with {shown(key)!r}, which engines never do")
            found[key] = value
        if (location := found.get("location", "")) not in self._sizes:
            raise _RefusedError(f"reads {shown(location)!r}, which the manifest does not list")
        offset = _natural(found.get("offset", "0"))
        length = _natural(found["length"]) if "length" in found else size
        if length != size or offset + length > self._sizes[location]:
            raise _RefusedError(f"reads {length} bytes at {offset} of {location} for {size}, which are not there")

    def _fields(
        self, known: Mapping[int, tuple[int, ...]], message: str, begin: int, end: int
    ) -> Iterator[tuple[int, int, int]]:
        """Yield (number, begin, end) of each field of a message that may have the known ones alone."""
        for number, wire, start, stop in fields(self._data, begin, end):
            if wire not in known.get(number, ()):
                raise _RefusedError(f"holds a {message} with field {number}, which engines never have")
            yield number, start, stop

    def _text(self, begin: int, end: int) -> str:
        if end - begin > TEXT_LIMIT:
            raise _RefusedError("holds a name that is longer than names are")
        try:
            return self._data[begin:end].decode()
        except UnicodeDecodeError:
            raise _RefusedError("holds a name that is no text") from None


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise _RefusedError(f"describes external data with the number {shown(text)!r}")
    return int(text)
