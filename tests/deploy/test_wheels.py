"""What wheels are said to be made for, and what a compiler for other machines reads of csrc/."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_versions_of_python():
    """Classifiers, wheels and the oldest that pip takes agree."""
    classifiers = [re.fullmatch(r".*:: (3\.\d+)", line) for line in PROJECT["project"]["classifiers"]]
    named = [found[1] for found in classifiers if found]
    assert [f"cp{one.replace('.', '')}-*" for one in named] == PROJECT["tool"]["cibuildwheel"]["build"]
    assert PROJECT["project"]["requires-python"] == f">={named[0]}"


def test_the_workflow_builds_on_each_system():
    workflow = yaml.safe_load((ROOT / ".github/workflows/wheels.yml").read_text())
    systems = workflow["jobs"]["wheels"]["strategy"]["matrix"]["os"]
    assert {re.match("[a-z]+", one)[0] for one in systems} == {"ubuntu", "macos", "windows"}
    assert any(one.endswith("-arm") for one in systems)


@pytest.mark.parametrize("isa", ["avx2", "avx512", "neon"])
def test_another_architecture_reads_nothing_of_a_kernel(isa):
    """As macOS compiles for two at once: AVX's flags reach one of them alone."""
    if not (compiler := shutil.which("g++")):
        pytest.skip("no g++")
    foreign = ["-U__x86_64__", "-U__aarch64__"]
    command = [compiler, "-std=c++17", *foreign, "-E", "-P", ROOT / f"csrc/guidance_stats_{isa}.cc"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == ""
