"""Calibrations that were replaced: kept beside the manifest, and brought back by their date.

`calibrations.json` in the engine directory holds, for each key, all calibrations that were written since the first one
was replaced, in this order, the one in force among them. Nothing but this module reads it: verdicts are by the manifest
alone. To bring one back changes the manifest and not this file, so nothing is lost.
"""

import os
from os import PathLike
from pathlib import Path

import msgspec

from memedge.engine import atomic
from memedge.engine.directory import EngineDirectory
from memedge.engine.errors import InputError, ManifestError
from memedge.engine.manifest import Calibration, Manifest, check_values, key_of, read_manifest, write_manifest
from memedge.engine.opening import automatic
from memedge.engine.providers import find

FILE = "calibrations.json"
MOST = 50  # calibrations kept for a key; the oldest go
SIZE_LIMIT = 1 << 26  # bytes

History = dict[str, list[Calibration]]


def check_writable(folder: Path) -> None:
    """Raise InputError if an engine directory cannot be written to."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(
            f"{folder} cannot be written to, and its manifest is where a calibration goes: change its permissions, or "
            "calibrate a copy."
        )


def earlier(folder: Path, manifest: Manifest, key: str) -> list[Calibration]:
    """Return the calibrations of a key that can be brought back, the oldest first.

    Raises:
        ManifestError: the history cannot be read.
    """
    now = manifest.calibrations.get(key)
    return [one for one in _read(folder).get(key, []) if one != now]


def replace_calibration(folder: Path, manifest: Manifest, key: str, new: Calibration) -> None:
    """Write a calibration into the manifest; the one that it replaces is kept in the history."""
    if old := manifest.calibrations.get(key):
        history = _read(folder)
        known = history.get(key, [])
        history[key] = [*known, *([] if old in known else [old]), new][-MOST:]
        atomic.write(folder / FILE, msgspec.json.encode(history) + b"\n")
    _put(folder, manifest, key, new)


def restore(
    path: str | PathLike[str], date: str | None = None, *, provider: str = "auto", precision: str | None = None
) -> tuple[str, Calibration]:
    """Bring an earlier calibration back, without scoring anything; return its key and itself.

    Args:
        path: the engine directory.
        date: that of the calibration, as `memedge info` shows it; default: the one before the one in force, so that
            one may go back step by step.
        provider: of which calibrations. "auto": that which "auto" runs, as in `Detector.load`.
        precision: likewise; default: the provider's best here.

    Raises:
        InputError: there is no such calibration, or the directory cannot be written to.
        EngineError: the directory is no engine, its history cannot be read, or the provider cannot run here.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    check_writable(folder)
    key = _key(folder, manifest, provider, precision)
    known, now = _read(folder).get(key, []), manifest.calibrations.get(key)
    if date is None:
        before = known[: len(known) - 1 - known[::-1].index(now)] if now in known else known
        if not before:
            raise InputError(
                f"{folder} keeps no calibration for {key} before the one in force: name an earlier one with --restore, "
                "as `memedge info` lists them, or calibrate again."
            )
        found = before[-1]
    else:
        named = [one for one in known if one.date == date]
        if not named:
            dates = ", ".join(one.date for one in known) or "none"
            raise InputError(f"{folder} keeps no calibration for {key} of {date!r}: it has {dates}.")
        found = named[-1]
    _put(folder, manifest, key, found)
    return key, found


def _put(folder: Path, manifest: Manifest, key: str, calibration: Calibration) -> None:
    changed = msgspec.structs.replace(manifest, calibrations={**manifest.calibrations, key: calibration})
    check_values(changed, folder / FILE)  # the history is a file that anyone may have changed
    write_manifest(folder, changed)


def _key(folder: Path, manifest: Manifest, provider: str, precision: str | None) -> str:
    """Return the key of the calibrations that are meant."""
    if provider == "auto":
        provider, precision = automatic(EngineDirectory(folder, manifest), precision, False)
    calibrated = manifest.calibrations
    meant = [key for key in calibrated if key.startswith(f"{find(provider).name}-")]
    if precision is not None:
        meant = [key for key in meant if key == key_of(provider, precision)]
    if len(meant) != 1:
        raise InputError(
            f"{folder} is calibrated for {', '.join(calibrated) or 'nothing'}, which does not say whose calibration is "
            "to come back: name one of these with --provider and --precision."
        )
    return meant[0]


def _read(folder: Path) -> History:
    path = folder / FILE
    try:
        if not path.exists():
            return {}
        if path.is_symlink() or path.stat().st_size > SIZE_LIMIT:
            raise ValueError
        return msgspec.json.decode(path.read_bytes(), type=History)
    except (ValueError, RecursionError, msgspec.DecodeError):
        raise ManifestError(f"{path} is no history of calibrations: remove it to begin a new one.") from None
