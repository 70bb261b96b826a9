"""Changing copies of engine directories, as damage or an attacker would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memedge.engine.directory import describe_file
from memedge.engine.engine import Engine

# What a calibration says of where it comes from, as plain JSON.
PROVENANCE = {
    "target_fpr": 0.01,
    "memorized": {"name": "a test", "sha256": "0" * 64, "prompts": 20},
    "clean": {"name": "a test", "sha256": "1" * 64, "prompts": 100},
    "strength": 1.0,
    "cross_validation": {
        "folds": 5,
        "seed": 0,
        "auc": {"value": 0.9, "lowest": 0.8, "highest": 1.0},
        "tpr": {"value": 0.5, "lowest": 0.4, "highest": 0.6},
        "fpr": {"value": 0.01, "lowest": 0.0, "highest": 0.1},
    },
    "date": "2026-11-22T12:00:00+00:00",
    "fitted_by": "a test",
}


def spoil_second_prompt(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make what an engine measures NaN for the second prompt of each call."""
    measure = engine.measure

    def bad(states: Any, prompt: Any, row: Any, operands: Any) -> Any:
        found = measure(states, prompt, row, operands)
        found[:, prompt == 1] = np.nan
        return found

    monkeypatch.setattr(engine, "measure", bad)


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
