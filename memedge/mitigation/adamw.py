"""AdamW (Loshchilov & Hutter, ICLR 2019), as torch.optim has it; without weight decay it is Adam."""

import numpy as np

from memedge.engine.arrays import Singles
from memedge.engine.errors import NotFiniteError

BETAS = 0.9, 0.999
EPSILON = 1e-8


class AdamW:
    """The moments of one array's gradients: float32 as the array, and not safe to share between threads."""

    def __init__(self, learning_rate: float, weight_decay: float = 0.01):
        self._rate, self._decay = learning_rate, weight_decay
        self._first: Singles = np.zeros((), dtype=np.float32)
        self._second = self._first
        self._steps = 0

    def step(self, values: Singles, gradient: Singles) -> Singles:
        """Return the values after one more step.

        Raises:
            NotFiniteError: they are beyond float32.
        """
        first, second = BETAS
        self._steps += 1
        with np.errstate(all="ignore"):  # what is not finite is an error below
            self._first = first * self._first + (1 - first) * gradient
            self._second = second * self._second + (1 - second) * gradient * gradient
            mean = self._first / (1 - first**self._steps)
            root = np.sqrt(self._second / (1 - second**self._steps))
            moved: Singles = values * (1 - self._rate * self._decay) - self._rate * mean / (root + EPSILON)
        if not np.isfinite(moved).all():
            raise NotFiniteError("The steps lead to values beyond float32: use a smaller learning rate.")
        return moved
