"""The fused reduction of a generation's steps, each against the one before (csrc/guidance_step.h; docs/methods.md §7).

Computed where the tensors are: by the native core on a CPU or an NVIDIA GPU, else in NumPy.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine import numpy_reduction, reduction
from memedge.engine.device_arrays import check_together, cuda_failure
from memedge.engine.errors import InputError, NotFiniteError
from memedge.engine.foreign import LEGACY_STREAM, ForeignTensor, cuda_core

NAMES = ("x", "eps_cond", "eps_uncond")


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """What one step says of each image; float64 [B] each, all finite.

    Attributes:
        norm: ‖Δ‖₂ of Δ = ε_c − ε_0.
        change: ‖ε_c − ε_c of the step before‖₂; 0 at the first step.
        move: ‖x − x of the step before‖₂; 0 at the first step.
    """

    norm: npt.NDArray[np.float64]
    change: npt.NDArray[np.float64]
    move: npt.NDArray[np.float64]


class StepReduction:
    """Reduces one generation's steps. x and ε_c of the last one are kept in float32, on the device that they are on."""

    def __init__(self) -> None:
        self._shape: tuple[int, ...] | None = None
        self._double = False
        self._memory: _HostMemory | _DeviceMemory | None = None

    def step(self, x: Any, cond: Any, uncond: Any, scale: float = 1.0, shift: float = 0.0) -> StepStatistics:
        """Take a step: ε = scale · prediction + shift · x of either prediction.

        Args:
            x: the latents [B, C, H, W] that the model was given: whatever `reduce_rows` takes.
            cond, uncond: its predictions, of the same shape and dtype, on the same device.

        Raises:
            InputError: tensors that cannot be read, or do not fit together or to the steps before.
            ProviderError: CUDA fails.
            NotFiniteError: NaN, infinity or overflow in any row.
        """
        tensors, dtype = _read(x, cond, uncond)
        shape, device = tensors[0].shape, tensors[0].device if isinstance(tensors[0], ForeignTensor) else None
        if self._memory is None:
            self._shape, self._double = shape, dtype == "float64"
            self._memory = _HostMemory(shape, dtype) if device is None else _DeviceMemory(shape, device)
        if shape != self._shape or device != self._memory.device:
            raise InputError(
                f"x has shape {shape} and was {self._shape} at the first step, or is on another device: make a new "
                "Monitor for each generation."
            )
        if self._double != (dtype == "float64"):  # what is kept of the last step is as wide as the first one's
            raise InputError(f"x is {dtype}, and was not at the first step: convert it to the first step's dtype.")
        out = self._memory.step(tensors, dtype, scale, shift)
        if bad := int(np.isnan(out[0]).sum()):
            raise NotFiniteError(
                f"{bad} of {len(out[0])} images have NaN, infinity or values too large to square in this step: run the "
                "model in a higher precision."
            )
        return StepStatistics(*out)

    def map(self) -> npt.NDArray[np.float32]:
        """Return Σ over channels of Δ² at each pixel of the last step, float32 [B, H, W].

        Raises:
            InputError: there was no step.
        """
        if self._memory is None:
            raise InputError("There was no step, and so there is no map: call step first.")
        return self._memory.map()


class _HostMemory:
    device = None

    def __init__(self, shape: tuple[int, ...], dtype: str):
        wide = np.float64 if dtype == "float64" else np.float32
        self._last_x, self._last_eps = np.empty(shape, wide), np.empty(shape, wide)
        self._map = np.empty((shape[0], *shape[2:]), np.float32)
        self._first = True

    def step(self, tensors: list[Any], dtype: str, scale: float, shift: float) -> npt.NDArray[np.float64]:
        rows, channels, height, width = tensors[0].shape
        x, cond, uncond = (reduction.row_by_row(array) for array in tensors)
        out, core = np.empty((3, rows)), reduction.core
        if core is None or dtype == "float64":
            self._last_x, self._last_eps, self._map = numpy_reduction.guidance_step(
                x, cond, uncond, None if self._first else (self._last_x, self._last_eps), dtype, (scale, shift), out
            )
        else:
            buffers = (x, cond, uncond, self._last_x, self._last_eps, self._map, out)
            addresses = [core.address(array) for array in buffers]
            core.guidance_step(*addresses, dtype, self._first, scale, shift, rows, channels, height * width)
        self._first = False
        return out

    def map(self) -> npt.NDArray[np.float32]:
        return self._map.copy()


class _DeviceMemory:
    def __init__(self, shape: tuple[int, ...], device: int):
        self.device = device
        self._core = cuda_core(reduction.core, NAMES[0])
        rows, channels, height, width = shape
        self._sizes, self._map_shape = (rows, channels, height * width), (rows, height, width)
        pixels, item = rows * height * width, 4
        with cuda_failure(device):
            self._state = [self._core.DeviceMemory(item * channels * pixels, device) for _ in range(2)]
            self._map = self._core.DeviceMemory(item * pixels, device)
        self._first = True

    def step(self, tensors: list[ForeignTensor], dtype: str, scale: float, shift: float) -> npt.NDArray[np.float64]:
        check_together(dict(zip(NAMES, tensors, strict=True)))
        out = np.empty((3, self._sizes[0]))
        known = [tensor.stream for tensor in tensors if tensor.stream is not None]
        streams = list(dict.fromkeys(known)) or [LEGACY_STREAM]
        pointers = [tensor.pointer for tensor in tensors] + [memory.address for memory in (*self._state, self._map)]
        with cuda_failure(self.device):
            self._core.cuda_guidance_step(
                *pointers,
                self._core.address(out),
                dtype,
                self._first,
                scale,
                shift,
                *self._sizes,
                device=self.device,
                streams=streams,
            )
        self._first = False
        return out

    def map(self) -> npt.NDArray[np.float32]:
        values = np.empty(self._map_shape, np.float32)
        with cuda_failure(self.device):
            self._map.download(values)
        return values


def _read(*given: Any) -> tuple[list[Any], str]:
    """Return the three tensors, all in host memory or all on GPUs, and their dtype."""
    read = [reduction.read(tensor, name) for tensor, name in zip(given, NAMES, strict=True)]
    tensors, dtypes = [tensor for tensor, _ in read], [dtype for _, dtype in read]
    for tensor, dtype, name in zip(tensors, dtypes, NAMES, strict=True):
        if len(tensor.shape) != 4 or tensor.shape != tensors[0].shape or 0 in tensor.shape:
            raise InputError(
                f"x has shape {tensors[0].shape} and {name} {tensor.shape}: give [B, C, H, W], the same of all three."
            )
        if dtype != dtypes[0]:
            raise InputError(f"x is {dtypes[0]} and {name} is {dtype}: convert one to the other's dtype.")
    if len({isinstance(tensor, ForeignTensor) for tensor in tensors}) > 1:
        raise InputError(
            "Of x, eps_cond and eps_uncond, some are on a GPU and some in host memory: move them together."
        )
    return tensors, dtypes[0]
