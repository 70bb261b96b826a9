"""The examples in docstrings: every public call has one, and it gives what it says.

They run in a folder that holds `engine`, a copy of the embedded engine; `model`, the checkpoint that it was exported
from, as a diffusers pipeline; and lists of its captions, `memorized.txt` and `clean.txt`.
"""

import doctest
import shutil
from importlib import import_module

import pytest

from memedge.embedded import EMBEDDED_ENGINE, captions

CALLS = {
    "memedge.calibration.calibrate": ["calibrate"],
    "memedge.detector": [
        "Detector.at",
        "Detector.detect",
        "Detector.explain",
        "Detector.load",
        "Detector.score",
        "Detector.score_embeddings",
    ],
    "memedge.evaluation.evaluate": ["evaluate"],
    "memedge.export.export": ["export"],
    "memedge.guidance": ["guidance_stats"],
    "memedge.integrations.diffusers": ["guard"],
    "memedge.monitor.monitor": ["Monitor", "Monitor.calibrate"],
    "memedge.mitigation.mitigator": ["Mitigator.embedding", "Mitigator.noise"],
}
MEMORIZED, CLEAN = 20, 40
# diffusers 0.42.1 with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from diffusers import StableDiffusionPipeline
    from guarded import make_pipe

    folder = tmp_path_factory.mktemp("pipeline") / "model"
    make_pipe(StableDiffusionPipeline).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(model)
    shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("baseline.*-*"))
    rows = [caption for caption in captions() if caption.split == "calibration"]
    for name, prompts in {
        "memorized.txt": [row.prompt for row in rows if row.memorized][:MEMORIZED],
        "clean.txt": [row.prompt for row in rows if not row.memorized][:CLEAN],
    }.items():
        (tmp_path / name).write_text("".join(f"{prompt}\n" for prompt in prompts))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(module: str) -> dict[str, doctest.DocTest]:
    """Return the examples of a module by what they are of."""
    found = doctest.DocTestFinder(exclude_empty=True).find(import_module(module), module)
    return {test.name.removeprefix(f"{module}."): test for test in found if test.examples}


@pytest.mark.parametrize("module", CALLS)
def test_every_public_call_has_an_example(module):
    assert sorted(examples(module)) == CALLS[module]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("module", "call"),
    [
        pytest.param(module, call, marks=[pytest.mark.slow] if call == "export" else [])
        for module, calls in CALLS.items()
        for call in calls
    ],
)
def test_example(module, call):
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    assert runner.run(examples(module)[call], out=said.append).failed == 0, "".join(said)
