"""Tensors in host memory that say that they are on a GPU."""

import ctypes

import numpy as np

from memedge.engine import dlpack

LEGACY = 1


class Dlpack:
    """A tensor whose memory is on the host, and which says that it is on a GPU."""

    def __init__(self, tensor, device=(2, 0)):
        self.tensor, self.device, self.streams = tensor, device, []

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream, max_version=None):
        self.streams.append(stream)
        capsule = self.tensor.__dlpack__(max_version=max_version)
        dlpack._raw(capsule, "x").device = dlpack._Device(*self.device)
        return capsule


class OldDlpack(Dlpack):
    def __dlpack__(self, *, stream):
        return super().__dlpack__(stream=stream)


class CudaArray:
    def __init__(self, array, **entries):
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            **entries,
        }


def memory(pointer, shape, dtype):
    """What a GPU would read there: bfloat16 as its bits."""
    dtype = np.dtype("uint16" if dtype == "bfloat16" else dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype).reshape(shape)
