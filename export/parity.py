"""How far an exported engine is from the torch model it was made from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memedge.engine.backend import Backend
from memedge.engine.errors import ExportError
from memedge.engine.manifest import Parity
from memedge.engine.precision import ENGINE
from memedge.engine.reduction import reduce_rows

# Only agreement is measured with them, so any text will do; the empty prompt comes first, for ε_0.
PROBES = ("", "a photo of a cat", "sunset over the sea, oil painting", "portrait of a man in a red hat", "x")

# ε [C, H, W] of prompt embeddings [L, D] on a row: (timestep, draw) in C order.
Predict = Callable[[npt.NDArray[np.float32], int], npt.NDArray[np.float32]]


def epsilon(predict: Predict, states: npt.NDArray[np.float32], draws: int) -> npt.NDArray[np.float32]:
    """Return ε, [B, 2, n, C, H, W], for states [B, L, D], one row at a time."""
    rows = np.stack([[predict(state, row) for row in range(2 * draws)] for state in states])
    return rows.reshape(len(states), 2, draws, *rows.shape[2:])


def engine_epsilon(
    backend: Backend,
    ids: npt.NDArray[np.int64],
    draws: int,
    states: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Return ε, [B, 2, n, C, H, W], that a backend computes for ids [B, I], one row at a time.

    `states` are those of the ids, [B, K, D], of an engine whose text encoder was left out.
    """
    memory, first = backend.memory, np.zeros(1, dtype=np.int64)
    states = memory.download(backend.encode(ids)) if states is None else states

    def predict(state: npt.NDArray[np.float32], row: int) -> npt.NDArray[np.float32]:
        prediction = backend.predict(memory.upload(state[None]), first, first + row)
        found: npt.NDArray[np.float32] = memory.download(prediction)[0]
        return found

    return epsilon(predict, states, draws)


@dataclass(frozen=True)
class Statistics:
    """ε_c [B, 2, n, C, H, W], and norm and alignment [B] per probe."""

    epsilon: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float64]
    alignment: npt.NDArray[np.float64]

    @staticmethod
    def of(prediction: npt.NDArray[np.float32], norm_factor: float) -> "Statistics":
        """Reduce ε [1 + B, 2, n, C, H, W], whose first entry is ε_0."""
        rows = reduce_rows(prediction[1:], prediction[0])
        return Statistics(prediction[1:], norm_factor * rows.norm[:, 0].mean(1), rows.channel[:, 1].mean(1))


@dataclass(frozen=True)
class Excess:
    """The largest differences in norm and alignment, as multiples of what is allowed."""

    norm: float
    alignment: float

    @property
    def within(self) -> bool:
        """Whether both are allowed; NaN is not."""
        return self.norm <= 1 and self.alignment <= 1


def compare(engine: Statistics, reference: Statistics) -> Parity:
    """Return the largest differences over the probes; the score's with γ = (1, 1), as nothing is calibrated yet."""
    own, true = engine.norm + engine.alignment, reference.norm + reference.alignment
    return Parity(
        epsilon_relative=_multiple(_largest(engine.epsilon - reference.epsilon), _largest(reference.epsilon)),
        norm_relative=_largest(_quotient(engine.norm, reference.norm) - 1),
        alignment_absolute=_largest(engine.alignment - reference.alignment),
        score_absolute=_largest(own - true),
    )


def worse(first: Parity, second: Parity) -> Parity:
    """Return the larger of each difference; NaN if one of them is."""
    names = Parity.__struct_fields__
    return Parity(**{name: float(np.maximum(getattr(first, name), getattr(second, name))) for name in names})


def excess(engine: Statistics, reference: Statistics, precision: str) -> Excess:
    """Return the largest differences over the probes as multiples of what the precision allows (engine/precision.py).

    What is not in its table, int8, may be any distance away.
    """
    if precision not in ENGINE:
        return Excess(0.0, 0.0)
    tolerance = ENGINE[precision]
    norms = zip(np.abs(engine.norm - reference.norm), tolerance.of_norms(reference.norm), strict=True)
    alignment = _largest(engine.alignment - reference.alignment) / tolerance.alignment
    return Excess(max(_multiple(float(difference), float(allowed)) for difference, allowed in norms), alignment)


def check(parity: Parity, found: Excess, precision: str, accept: bool) -> tuple[str, ...]:
    """Return what is to be said of an engine's parity, in sentences: nothing, where it is as the table has it.

    Raises:
        ExportError: it is further from torch than the precision allows, and nobody accepts that; or it is infinitely.
    """
    if precision not in ENGINE:
        return ()
    norm, alignment = ENGINE[precision].norm, ENGINE[precision].alignment
    distance = f"{parity.norm_relative:.1e} (norm, relative) and {parity.alignment_absolute:.1e} (alignment)"
    allowed = f"{norm:g} (of a norm, or of the probes' median norm) and {alignment:g}"
    if found.within:
        if parity.norm_relative <= norm:
            return ()
        return (f"It differs from the original by {distance}: more than {norm:g} of the quietest norms alone.",)
    finite = bool(np.isfinite([getattr(parity, name) for name in Parity.__struct_fields__]).all())
    if accept and finite:
        return (
            f"It is less exact than {precision} promises, and was exported with --accept-parity: it differs from the "
            f"original by {distance}, more than {allowed}.",
        )
    ways = ["export in fp32"] * (precision != "fp32")
    ways += ["accept that with --accept-parity (accept_parity=True in Python)" if finite else "report this checkpoint"]
    raise ExportError(
        f"The exported engine differs from the original by {distance}, more than the {allowed} that {precision} "
        f"allows: nothing was written; {', or '.join(ways)}."
    )


def _largest(values: npt.NDArray[np.floating]) -> float:
    return float(np.abs(values).max())


def _multiple(difference: float, scale: float) -> float:
    """Return their quotient; 0 if there is no difference, whatever the scale."""
    return (difference / scale if scale else math.inf) if difference else 0.0


def _quotient(own: npt.NDArray[np.float64], true: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return own / true, 1 where both are equal: 0 too, of a model that no prompt changes."""
    with np.errstate(divide="ignore"):
        found: npt.NDArray[np.float64] = np.divide(own, true, out=np.ones_like(own), where=own != true)
    return found
