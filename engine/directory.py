"""Opening an engine directory: every file is verified before it is parsed by anyone."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

from memedge.engine.errors import IntegrityError, shown
from memedge.engine.graphs import check_graph
from memedge.engine.manifest import MOST_TAPS, FileEntry, Manifest, read_manifest

TOKENIZER = "tokenizer.json"
TOKENIZERS = (TOKENIZER, "tokenizer_2.json", "tokenizer_3.json")  # one for each text encoder
TEXT_ENCODER = "text_encoder.onnx"
UNET = "unet.onnx"
PREFIX = "prefix.onnx"  # not in int8 engines, whose UNet is made for the engine's own noise
# Not in int8 engines either, nor where the model has an operator that export/graphs/differentiate.py has no rule for.
GRADIENT = "gradient.onnx"
NOISE_GRADIENT = "noise_gradient.onnx"
SCREENS = tuple(f"screen_{number}.onnx" for number in range(1, MOST_TAPS + 1))  # the UNet up to each tap, if any
BASELINE = "baseline.safetensors"
Tensors = dict[str, npt.NDArray[Any]]
FILE_NAMES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # so that a path is nothing else than it says
REQUIRED = (TOKENIZER, TEXT_ENCODER, UNET, BASELINE)


@dataclass(frozen=True)
class Baseline:
    """What does not depend on the prompt.

    sample: float32 [n, C, H, W], the noise x. uncond: float32 [2, n, C, H, W], ε_0 at (t_norm, t_cos), as ONNX Runtime
    computed it. cached: the UNet's cached inputs, [2n, …], float16 in fp16 engines, else float32.
    """

    sample: npt.NDArray[np.float32]
    uncond: npt.NDArray[np.float32]
    cached: Tensors


@dataclass(frozen=True)
class EngineDirectory:
    """A verified engine directory."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: Path) -> "EngineDirectory":
        """Verify `path` against its manifest.

        Raises:
            ManifestError: it is no engine, or of another schema.
            IntegrityError: a file is missing, of another size or content, or outside the directory.
        """
        manifest = read_manifest(path)
        missing = [name for name in REQUIRED if name not in manifest.files]
        if missing:
            raise IntegrityError(f"The manifest of {path} does not list {missing[0]}: export the engine again.")
        # All sizes first: they are cheap, and a truncated copy is the commonest damage.
        for name, entry in manifest.files.items():
            _check_size(_contained(path, name), entry)
        for name, entry in manifest.files.items():
            if describe_file(path / name) != entry:
                raise IntegrityError(f"{path / name} is not the file that was exported: copy or export it again.")
        return EngineDirectory(path, manifest)

    @property
    def identity(self) -> str:
        """A hash of all the engine's files: what is computed from them and kept belongs to it."""
        return hashlib.sha256(msgspec.json.encode(self.manifest.files, order="sorted")).hexdigest()

    def file(self, name: str) -> Path:
        return self.path / name

    def graph(self, name: str) -> Path:
        """Return the path of a graph that may be given to a runtime.

        Raises:
            IntegrityError: the manifest does not list it, or engine/graphs.py refuses it.
        """
        if name not in self.manifest.files:
            raise IntegrityError(f"The manifest of {self.path} does not list {name}: export the engine again.")
        if name not in self._checked:
            check_graph(self.file(name), {name: entry.size for name, entry in self.manifest.files.items()})
            self._checked.add(name)
        return self.file(name)

    @cached_property
    def _checked(self) -> set[str]:
        """The graphs that were looked through."""
        return set()

    @property
    def tokenizers(self) -> list[Path]:
        """The tokenizers' files: one for each text encoder."""
        return [self.file(name) for name in TOKENIZERS if name in self.manifest.files]

    @property
    def token_lengths(self) -> tuple[int, ...]:
        """How many ids each tokenizer makes of a prompt.

        Raises:
            IntegrityError: the manifest has not one for each.
        """
        lengths = self.manifest.lengths(len(self.tokenizers))
        if len(lengths) != len(self.tokenizers):
            raise IntegrityError(f"{self.path} has not a tokenizer for each of its lengths: export the engine again.")
        return lengths

    @property
    def ids_width(self) -> int:
        """How many ids a prompt has: those of all tokenizers."""
        return sum(self.token_lengths)

    @cached_property
    def baseline(self) -> Baseline:
        """The cached noise, ε_0 and inputs; read once.

        Raises:
            IntegrityError: tensors are missing, of another shape or dtype than the manifest says, or not finite.
        """
        manifest = self.manifest
        latents = (manifest.draws, *manifest.latent_shape)
        rows = 2 * manifest.draws
        half = np.float16 if manifest.precision == "fp16" else np.float32
        expected: dict[str, tuple[tuple[int, ...], type]] = {
            "sample": (latents, np.float32),
            "uncond": ((2, *latents), np.float32),
            **{name: ((rows, *shape), half) for name, shape in manifest.cached.items()},
        }
        tensors = read_tensors(self.file(BASELINE), expected)
        sample, uncond = tensors.pop("sample"), tensors.pop("uncond")
        return Baseline(sample, uncond, tensors)


def read_tensors(path: Path, expected: dict[str, tuple[tuple[int, ...], type]]) -> Tensors:
    """Return the tensors of a safetensors file; `expected` gives the shape and dtype of each.

    Raises:
        IntegrityError: tensors are missing, of another shape or dtype, or not finite.
    """
    try:
        tensors = load_file(path)
    except Exception:  # the library raises SafetensorError, and whatever its types and NumPy's do not agree on
        raise IntegrityError(f"{path} is not a safetensors file: export the engine again.") from None
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            raise IntegrityError(f"{path} holds no {np.dtype(dtype)} tensor {name!r} of shape {shape}: export again.")
        if not np.isfinite(tensor).all():
            raise IntegrityError(f"{path} holds NaN or infinity in {name!r}: export the engine again.")
    return {name: tensors[name] for name in expected}


def describe_file(path: Path) -> FileEntry:
    """Return the manifest's entry for a file; raises IntegrityError where it cannot be read."""
    try:
        return FileEntry(path.stat().st_size, sha256(path))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read ({error.strerror}): check its permissions.") from None


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in lower-case hexadecimal; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _contained(folder: Path, name: str) -> Path:
    """Return the path of a file named by the manifest, which may name only plain files in the folder itself."""
    if not FILE_NAMES.fullmatch(name):
        raise IntegrityError(
            f"The manifest of {folder} names {shown(repr(name))}, which is outside it or no engine's file: do not use "
            "this engine."
        )
    path = folder / name
    if path.resolve() != folder.resolve() / name:
        raise IntegrityError(f"{path} is a link: copy the engine as plain files.")
    return path


def _check_size(path: Path, entry: FileEntry) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing: copy or export the engine again.")
    size = path.stat().st_size
    if size != entry.size:
        raise IntegrityError(f"{path} has {size} bytes instead of {entry.size}: copy or export the engine again.")
