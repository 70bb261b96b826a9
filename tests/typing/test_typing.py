"""What a type checker in strict mode says of a user's script: nothing, and of each mistake what it is."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import memedge

SCRIPT, MISTAKES = (Path(__file__).with_name(name) for name in ("user_script.py", "mistakes.py"))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, list[tuple[int, str, str]]]:
    """The line, rule and words of each error and warning, by file, as a user's project has them."""
    folder = tmp_path_factory.mktemp("project")  # with no checkout near, what is installed is read
    for path in (SCRIPT, MISTAKES):
        shutil.copy(path, folder)
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr  # there are mistakes
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2
    diagnostics = {SCRIPT.name: [], MISTAKES.name: []}
    for one in report["generalDiagnostics"]:
        line = one["range"]["start"]["line"] + 1
        diagnostics[Path(one["file"]).name].append((line, one.get("rule", ""), one["message"]))
    return diagnostics


def test_a_users_script_is_sound(found):
    assert found[SCRIPT.name] == []


def test_mistakes_are_found(found):
    """Each in its line, by the rule that is named there, and nothing else but types that are unknown after it."""
    lines = enumerate(MISTAKES.read_text().splitlines(), start=1)
    planted = [(number, rule[1]) for number, line in lines if (rule := re.search(r"# (report\w+)", line))]
    said = [(line, rule) for line, rule, _ in found[MISTAKES.name] if not rule.startswith("reportUnknown")]
    assert said == planted, found[MISTAKES.name]


@pytest.mark.parametrize("name", memedge.__all__)
def test_the_script_has_every_name(name):
    assert re.search(rf"\bmemedge\.{name}\b", SCRIPT.read_text())
