"""Reading protobuf's wire format: enough to look through a graph without the package that would build it in memory."""

from collections.abc import Iterator
from mmap import mmap

Bytes = bytes | mmap
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5  # wire types; groups, 3 and 4, are not read
FIXED = {FIXED64: 8, FIXED32: 4}
LONGEST_VARINT = 10  # bytes of 64 bits, seven in each


class WireError(ValueError):
    """The bytes are no protobuf message."""


def fields(data: Bytes, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, wire type, begin, end) of each field of the message data[start:stop].

    data[begin:end] is the content of a field with a length or of a fixed size. Of a varint, `begin` is its value.

    Raises:
        WireError: the message is truncated, or holds a group or an unknown wire type.
    """
    while start < stop:
        tag, start = _varint(data, start, stop)
        number, wire = tag >> 3, tag & 7
        if wire == LENGTH:
            size, start = _varint(data, start, stop)
            end = start + size
            if end > stop:
                raise WireError("it is truncated")
            yield number, wire, start, end
            start = end
        elif wire == VARINT:
            value, start = _varint(data, start, stop)
            yield number, VARINT, value, start
        elif wire in FIXED:
            end = start + FIXED[wire]
            if end > stop:
                raise WireError("it is truncated")
            yield number, wire, start, end
            start = end
        else:
            raise WireError("it is not written as protobuf is")


def varints(data: Bytes, start: int, stop: int) -> Iterator[int]:
    """Yield the numbers of a packed field; raises WireError."""
    while start < stop:
        value, start = _varint(data, start, stop)
        yield value


def _varint(data: Bytes, start: int, stop: int) -> tuple[int, int]:
    """Return an unsigned number of at most 64 bits, and where it ends."""
    if start < stop and (value := data[start]) < 0x80:  # nearly always
        return value, start + 1
    value = 0
    for place in range(start, min(stop, start + LONGEST_VARINT)):
        byte = data[place]
        value |= (byte & 0x7F) << 7 * (place - start)
        if byte < 0x80:
            if value >> 64:
                break
            return value, place + 1
    raise WireError("a number in it has no end")
