"""Plans: an engine's graphs compiled by TensorRT for one GPU target, verified before anyone parses them.

They lie in the folder `plans` of the engine directory, or in the user's cache if that cannot be written to. A manifest
of their own lies beside them, because a build never changes the engine's manifest. Sizes and hashes show damage, and
plans of another engine, version or GPU. They do not show who made a plan: plans are built, never shipped
(docs/engine.md).
"""

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from memedge.engine import atomic, cache
from memedge.engine.directory import EngineDirectory, describe_file, sha256
from memedge.engine.errors import EngineError, IntegrityError, ProviderError
from memedge.engine.manifest import SIZE_LIMIT, FileEntry
from memedge.engine.tensorrt_module import PlanProvider

SCHEMA: Final = 1
FOLDER = "plans"
FILE_NAME = "manifest.json"

Component = Literal["unet", "text", "screen_1", "screen_2", "screen_3", "screen_4"]
SCREENS: tuple[Component, ...] = ("screen_1", "screen_2", "screen_3", "screen_4")  # of each tap
# File names are made of these, so they can be neither a path nor anything else than they say.
Target = Annotated[str, msgspec.Meta(pattern=r"\Asm[0-9]{2,3}\Z")]
Version = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]+(\.[0-9a-z]+){1,5}\Z", max_length=32)]
CacheName = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A(timing|runtime-(unet|text|screen_[1-4]))-tensorrt(-rtx)?-sm[0-9]{2,3}-[0-9a-z.]{3,32}\.cache\Z"
    ),
]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(gt=0, le=1 << 36)]


class Plan(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One plan file, and how it was built.

    Attributes:
        component: the UNet, the text encoder, or the UNet up to a tap.
        backend: whose plan it is.
        target: the GPU's compute capability, such as "sm89".
        version: of TensorRT; it reads no other version's plans.
        gpu: the GPU that it was built on and is for; None for TensorRT-RTX, whose plans are for any of the target.
        most: the most rows of one call, or prompts of one of the text encoder.
        seconds: that building took.
        peak_memory: the largest resident size of the building process until then, in bytes.
        size: in bytes.
        sha256: in lower-case hexadecimal.
    """

    component: Component
    backend: PlanProvider
    target: Target
    version: Version
    gpu: Annotated[str, msgspec.Meta(max_length=256)] | None
    most: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    peak_memory: Annotated[int, msgspec.Meta(ge=0)]
    size: Size
    sha256: Sha256

    @property
    def name(self) -> str:
        return f"{self.component}-{self.backend}-{self.target}-{self.version}.plan"


class PlanManifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """plans/manifest.json: the identity of the engine that all plans are of, and TensorRT's own caches by name."""

    schema: Literal[1]
    engine: Sha256
    plans: tuple[Plan, ...]
    caches: dict[CacheName, FileEntry]


@dataclass(frozen=True)
class PlanFile:
    """A verified plan file."""

    path: Path
    plan: Plan


@dataclass(frozen=True)
class Plans:
    """The components' plans for one GPU target.

    Attributes:
        unet: the UNet's.
        text: the text encoder's.
        screens: of each of the engine's taps; empty if one is missing, as in what was built before there were any.
        rebuild: how to make better ones, for errors.
    """

    unet: PlanFile
    text: PlanFile
    screens: tuple[PlanFile, ...]
    rebuild: str


def find(
    directory: EngineDirectory, provider: PlanProvider, target: str, version: str, gpu: str | None = None
) -> Plans:
    """Return the plans that TensorRT `version` can run on this GPU: of target `target`, and of model `gpu` if given.

    Raises:
        ProviderError: there are none, or only of another target, GPU model, TensorRT version or engine.
        IntegrityError: they are damaged, or links.
    """
    rebuild = f"run `memedge build {shlex.quote(str(directory.path))} --provider {provider} --gpu {target.upper()}`"
    problem: EngineError | None = None
    for folder in cache.folders(directory):
        if not os.path.isfile(folder / FOLDER / FILE_NAME):  # noqa: PTH113 - Path's raises in another user's home
            continue
        try:
            return _find(folder, directory, provider, target, version, gpu, rebuild)
        except EngineError as error:
            problem = problem or error
    raise problem or ProviderError(f"{directory.path} has no plans for provider {provider!r}: {rebuild}.")


def _find(
    folder: Path,
    directory: EngineDirectory,
    provider: PlanProvider,
    target: str,
    version: str,
    gpu: str | None,
    rebuild: str,
) -> Plans:
    place = folder / FOLDER
    manifest = _read(folder)
    if manifest is None:
        raise IntegrityError(f"{place / FILE_NAME} is no manifest of plans of this memedge: {rebuild}.")
    if manifest.engine != directory.identity:
        raise ProviderError(f"The plans in {place} are of another engine, or of this one before a change: {rebuild}.")
    plans = [plan for plan in manifest.plans if plan.backend == provider]
    if not plans:
        raise ProviderError(f"{place} holds no plans for provider {provider!r}: {rebuild}.")
    if not any(plan.target == target for plan in plans):
        others = ", ".join(sorted({plan.target.upper() for plan in plans}))
        raise ProviderError(
            f"The plans for {provider!r} in {place} are for {others}, and this GPU is {target.upper()}: {rebuild}."
        )
    plans = [plan for plan in plans if plan.target == target]
    if not any(plan.version == version for plan in plans):
        others = ", ".join(sorted({plan.version for plan in plans}))
        raise ProviderError(
            f"The plans in {place} are of TensorRT {others}, and version {version} is installed: {rebuild}."
        )
    found = {plan.component: plan for plan in plans if plan.version == version}
    if missing := [component for component in ("unet", "text") if component not in found]:
        raise IntegrityError(f"The manifest in {place} lists no plan of the {missing[0]}: {rebuild}.")
    for plan in found.values():
        if gpu is not None and plan.gpu not in (None, gpu):
            raise ProviderError(f"{place / plan.name} is for the GPU {plan.gpu}, and this one is {gpu}: {rebuild}.")
    files = {component: PlanFile(place / plan.name, plan) for component, plan in found.items()}
    for file in files.values():
        verify(file, rebuild)
    screens = [files.get(component) for component in SCREENS[: len(directory.manifest.taps)]]
    whole = tuple(file for file in screens if file is not None)
    return Plans(files["unet"], files["text"], whole if len(whole) == len(screens) else (), rebuild)


def verify(file: PlanFile, rebuild: str) -> None:
    """Raise IntegrityError, which says to `rebuild`, unless a file is the plan that was built."""
    if not _is_own(file.path.parent.parent, file.path):
        raise IntegrityError(f"{file.path} is missing or a link: {rebuild}.")
    if file.path.stat().st_size != file.plan.size or sha256(file.path) != file.plan.sha256:
        raise IntegrityError(f"{file.path} is not the plan that was built: {rebuild}.")


def writable_folder(directory: EngineDirectory) -> Path:
    """Return the folder for new plans, made if need be; the first of those that `find` looks into.

    Plans of another engine that lie there are removed: they would never be found again.

    Raises:
        EngineError: neither the engine directory nor the user's cache can be written to, or `plans` is a link there.
    """
    for folder in cache.writable(directory):
        place = folder / FOLDER
        if place.is_symlink():
            raise IntegrityError(f"{place} is a link, which plans are not read through: make it a plain folder.")
        place.mkdir(exist_ok=True)
        manifest = _read(folder)
        if manifest is not None and manifest.engine != directory.identity:
            (place / FILE_NAME).unlink()
            for name in (*manifest.caches, *(plan.name for plan in manifest.plans)):
                (place / name).unlink(missing_ok=True)
        return place
    tried = " and ".join(map(str, cache.folders(directory)))
    raise EngineError(f"Plans cannot be written to {tried}: make a folder writable, or set XDG_CACHE_HOME to one.")


def record(place: Path, directory: EngineDirectory, plans: Sequence[tuple[Plan, memoryview]]) -> None:
    """Add plans to `place`, the `writable_folder`: first their content, each in one step, then all to its manifest.

    Raises:
        OSError: they cannot be written; what was listed before still is.
    """
    for plan, content in plans:
        atomic.write(place / plan.name, content)
    manifest = _current(place, directory)
    names = {plan.name for plan, _ in plans}
    kept = (plan for plan in manifest.plans if plan.name not in names)
    _write(place, msgspec.structs.replace(manifest, plans=(*kept, *(plan for plan, _ in plans))))


def describe(content: memoryview, **fields: object) -> Plan:
    """Return the entry of a plan: its other fields as given, its size and hash from its content.

    Raises:
        msgspec.ValidationError: a field is not what manifests may hold.
    """
    entry = {**fields, "size": content.nbytes, "sha256": hashlib.sha256(content).hexdigest()}
    return msgspec.convert(entry, Plan)


def read_cache(place: Path, directory: EngineDirectory, name: str) -> bytes:
    """Return a cache of TensorRT's; empty if there is none or it was damaged, since all then only takes longer."""
    entry = _current(place, directory).caches.get(name)
    path = place / name
    if entry is None or not _is_own(place.parent, path) or describe_file(path) != entry:
        return b""
    return path.read_bytes()


def record_cache(place: Path, directory: EngineDirectory, name: str, content: memoryview) -> None:
    """Keep a cache of TensorRT's for the next process; raises OSError."""
    atomic.write(place / name, content)
    manifest = _current(place, directory)
    caches = {**manifest.caches, name: describe_file(place / name)}
    _write(place, msgspec.structs.replace(manifest, caches=caches))


def _current(place: Path, directory: EngineDirectory) -> PlanManifest:
    """Return the manifest in `place`, or an empty one if that is none, or another engine's."""
    manifest = _read(place.parent)
    if manifest is not None and manifest.engine == directory.identity:
        return manifest
    return PlanManifest(SCHEMA, directory.identity, (), {})


def _read(folder: Path) -> PlanManifest | None:
    """Return the manifest of plans in `folder`, or None if what is there is none."""
    path = folder / FOLDER / FILE_NAME
    if not _is_own(folder, path) or path.stat().st_size > SIZE_LIMIT:
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=PlanManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _write(place: Path, manifest: PlanManifest) -> None:
    atomic.write(place / FILE_NAME, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _is_own(folder: Path, path: Path) -> bool:
    """Return whether a path in the folder's `plans` is a plain file that lies there and nowhere else."""
    return path.is_file() and path.resolve() == folder.resolve() / FOLDER / path.name
