"""Producers of tensors that describe themselves at random: DLPack capsules, and array interfaces of CUDA.

Whatever a capsule says, the values it names lie in a buffer here, or at addresses that no memory has: a library that
names foreign memory ends the process, and nobody can check that.
"""

import ctypes
from random import Random
from typing import Any

import numpy as np

from memedge.engine import dlpack

BUFFER = np.ones(1 << 18, dtype=np.float32)
MIDDLE = BUFFER.ctypes.data + BUFFER.nbytes // 2  # sizes ≤ 6 and strides ≤ 900 stay within, in five dimensions
LABELS = (b"dltensor", b"dltensor", b"dltensor_versioned", b"dltensor_versioned", b"used_dltensor", b"x")

_new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class FakeCapsule:
    """Exports a DLPack capsule whose fields are plausible, or not."""

    def __init__(self, random: Random):
        def mostly(plain: Any, *odd: Any) -> Any:
            return plain if random.random() < 0.85 else random.choice(odd)

        shape = [random.randint(1, 6) for _ in range(mostly(4, 0, 2, 3, 5))]
        strides, vast = [random.choice((-900, -7, 0, 1, 3, 900)) for _ in shape], False
        if shape:
            place = random.randrange(len(shape))
            shape[place] = mostly(shape[place], 0, -1, 1 << 62, -(1 << 62))
            strides[place] = mostly(strides[place], 1 << 61, -(1 << 61))
            if vast := random.random() < 0.05:
                shape[place], strides[place] = 1 << 40, 0
        label = random.choice(LABELS)
        managed: Any = dlpack._ManagedTensorVersioned() if label == b"dltensor_versioned" else dlpack._Tensor()
        if label == b"dltensor_versioned":
            managed.major, managed.minor = mostly((1, 0), (0, 8), (1, 99), (2, 0))
            managed.flags = mostly(0, 1, 2, 7, 8, 1 << 63)
        raw = managed.tensor if label == b"dltensor_versioned" else managed
        sizes, steps = (ctypes.c_int64 * max(1, len(one)) for one in (shape, strides))
        self._kept = managed, sizes(*shape), steps(*strides)
        raw.data = mostly(MIDDLE, None)
        raw.device = dlpack._Device(mostly(1, 2, 3, 7, 10, 13, 99, -1), mostly(0, 1, -1))
        raw.ndim = mostly(len(shape), -1, 70, (1 << 31) - 1)
        raw.dtype = dlpack._DataType(mostly(2, 0, 4, 5, 99), mostly(32, 8, 16, 64), mostly(1, 0, 2))
        raw.shape = ctypes.cast(mostly(self._kept[1], None), ctypes.POINTER(ctypes.c_int64))
        own = self._kept[2] if vast else mostly(self._kept[2], None)
        raw.strides = ctypes.cast(own, ctypes.POINTER(ctypes.c_int64))
        raw.byte_offset = mostly(0, 1, 2, 4, 1 << 63, (1 << 64) - 4)
        self._device = mostly((raw.device.type, raw.device.id), (1, 0), (2, 0), None, ("a", "b"), (1,), (1 << 70, 0))
        self._label, self._returned = label, mostly("capsule", None, 5)

    def __dlpack_device__(self) -> Any:
        return self._device

    def __dlpack__(self, **_asked: Any) -> Any:
        if self._returned != "capsule":
            return self._returned
        return _new(ctypes.addressof(self._kept[0]), self._label, None)


class FakeInterface:
    """Has a `__cuda_array_interface__` whose entries are plausible, or not."""

    def __init__(self, random: Random, values: tuple[Any, ...]):
        entries: dict[str, Any] = {
            "shape": (1, 4, 8, 8),
            "typestr": "<f4",
            "data": (MIDDLE, True),
            "version": 3,
            "strides": None,
        }
        odd = (*values, (1, 4, -8, 8), (1.0, 4, 8, 8), (1 << 62,) * 4, (0, True), (1 << 70, True), ">f4", "<f3", "|O")
        for _ in range(random.randint(1, 3)):
            key = random.choice((*entries, "mask", "stream", "descr", "x"))
            if random.random() < 0.2:
                entries.pop(key, None)
            else:
                entries[key] = random.choice(odd)
        self.__cuda_array_interface__: Any = entries if random.random() < 0.95 else random.choice(values)
