"""Changing copies of engine directories, as damage or an attacker would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memedge.engine.directory import describe_file


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to the manifest as plain JSON."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def list_file(folder: Path, name: str, path: Path | None = None) -> None:
    """Enter a file into the manifest with its true size and hash."""
    entry = describe_file(path or folder / name)
    edit_manifest(folder, lambda m: m["files"].update({name: {"size": entry.size, "sha256": entry.sha256}}))
