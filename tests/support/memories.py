"""The processor's memory, counting what crosses a bus where memory is a GPU's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.memory import HostMemory, Tensor


class CountingMemory(HostMemory):
    """Lists the bytes of every transfer, and counts graphs and their launches."""

    def __init__(self):
        super().__init__(threads=1)
        self.reset()

    def reset(self) -> None:
        self.uploads: list[int] = []
        self.downloads: list[int] = []
        self.captures = self.launches = 0

    def upload(self, array: npt.NDArray[Any]) -> Tensor:
        self.uploads.append(array.nbytes)
        return super().upload(array.copy())  # a GPU would not see later changes either

    def write(self, array: npt.NDArray[Any], target: Tensor) -> None:
        self.uploads.append(array.nbytes)
        super().write(array, target)

    def download(self, tensor: Tensor) -> npt.NDArray[Any]:
        self.downloads.append(tensor.nbytes)
        return super().download(tensor)

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Tensor:
        tensor = super().empty(shape, dtype)
        tensor.owner.view(np.uint8)[...] = 0xFF  # NaN: what was never written must not be read
        return tensor

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        work()

        def launch() -> None:
            self.launches += 1
            work()

        return launch
