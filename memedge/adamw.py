"""AdamW (Loshchilov & Hutter, ICLR 2019), as torch.optim has it; without weight decay it is Adam."""

import numpy as np
import numpy.typing as npt

BETAS = 0.9, 0.999
EPSILON = 1e-8

Array = npt.NDArray[np.float32]


class AdamW:
    """The moments of one array's gradients: float32 as the array, and not safe to share between threads."""

    def __init__(self, learning_rate: float, weight_decay: float = 0.01):
        self._rate, self._decay = learning_rate, weight_decay
        self._first = self._second = np.float32(0)
        self._steps = 0

    def step(self, values: Array, gradient: Array) -> Array:
        """Return the values after one more step."""
        first, second = BETAS
        self._steps += 1
        self._first = np.asarray(first * self._first + (1 - first) * gradient)
        self._second = np.asarray(second * self._second + (1 - second) * gradient * gradient)
        mean = self._first / (1 - first**self._steps)
        root = np.sqrt(self._second / (1 - second**self._steps))
        moved: Array = values * (1 - self._rate * self._decay) - self._rate * mean / (root + EPSILON)
        return moved
