"""ε_0 of a backend: Δ is a small difference, so both of its sides must come from the same graph, runtime and precision.

The engine directory ships ε_0 as ONNX Runtime computed it at export. Any other backend or precision computes its own
on first use and keeps it in `baseline.<provider>-<precision>.safetensors` (engine/cache.py says where). Within it
stand the engine, what computed it, and a digest of it: a file that was changed is computed again. The digest has no
key. Whoever can write the file can make another that fits (docs/engine.md).
"""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from memedge.engine import atomic, cache
from memedge.engine.backend import Backend
from memedge.engine.directory import EngineDirectory, read_tensors
from memedge.engine.errors import IntegrityError, NotFiniteError
from memedge.engine.manifest import key_of
from memedge.engine.memory import Tensor

DIGEST = "sha256"  # of ε_0's values; beside it: the engine's identity, the backend's key and its runtime


def unconditional(directory: EngineDirectory, backend: Backend, empty: Tensor) -> npt.NDArray[np.float32]:
    """Return ε_0, float32 [2, n, C, H, W], of `backend`, whose states of the empty prompt are `empty`, [1, L, D].

    Raises:
        NotFiniteError: the backend computes NaN or infinity.
    """
    key = backend.key
    manifest = directory.manifest
    if key == key_of("cpu", manifest.precision):
        return directory.baseline.uncond
    shape = (2, manifest.draws, *manifest.latent_shape)
    identity = {"engine": directory.identity, "backend": key, "runtime": backend.identity}
    name = f"baseline.{key}.safetensors"
    for folder in cache.folders(directory):
        found = _read(folder / name, identity, shape)
        if found is not None:
            return found
    first = np.zeros(1, dtype=np.int64)
    # Row by row, so that any number of draws takes the memory of one.
    rows = [backend.memory.download(backend.predict(empty, first, first + row)) for row in range(2 * manifest.draws)]
    uncond = np.concatenate(rows).reshape(shape)
    if not np.isfinite(uncond).all():
        raise NotFiniteError(f"Provider {key} computes NaN or infinity for the empty prompt: use another precision.")
    for folder in cache.writable(directory):
        try:
            atomic.write(folder / name, save({"uncond": uncond}, {**identity, DIGEST: _digest(uncond)}))
            break
        except OSError:  # a full disk; without the file, ε_0 is computed at each start
            continue
    return uncond


def _read(path: Path, identity: dict[str, str], shape: tuple[int, ...]) -> npt.NDArray[np.float32] | None:
    """Return the tensor if it is there, whole, as it was kept, and of this engine, backend and runtime."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        uncond: npt.NDArray[np.float32] = read_tensors(path, {"uncond": (shape, np.float32)})["uncond"]
    except (OSError, SafetensorError, IntegrityError):
        return None
    return uncond if metadata == {**identity, DIGEST: _digest(uncond)} else None


def _digest(uncond: npt.NDArray[np.float32]) -> str:
    return hashlib.sha256(uncond.tobytes()).hexdigest()
