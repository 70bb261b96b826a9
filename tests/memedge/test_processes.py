"""Detectors in other processes: pickled, forked, without a home, many at once."""

import os
import pickle
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from engines import edit_manifest

from memedge import Detector, InputError, Mitigator
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.errors import IntegrityError, ProviderError

PROMPTS = ["the left luggage sign", "a red bicycle"]


def test_a_detector_goes_to_another_process(detector):
    """By spawn, where nothing is inherited."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(Detector.score, detector, PROMPTS).result()
    np.testing.assert_array_equal(found.score, detector.score(PROMPTS).score)


@pytest.fixture
def engine(tmp_path):
    """A copy of the embedded engine without what was computed on first use."""
    ignored = shutil.ignore_patterns("baseline.*-*", "plans")
    return shutil.copytree(EMBEDDED_ENGINE, tmp_path / "one" / "engine", ignore=ignored)


def test_what_travels_is_path_and_options(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(engine.parent)
    detector = Detector.load(engine.name, "cpu", threads=1, batch_size=3)
    content = pickle.dumps(detector)
    assert len(content) < 1000
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(content)
    assert again.info == Detector.load(engine, detector.info.provider, threads=1).info
    assert again.engine.rows_per_call == 3


def test_another_engine_at_the_path_is_noticed(engine):
    content = pickle.dumps(Detector.load(engine, "cpu"))
    edit_manifest(engine, lambda manifest: manifest.update(notes=["changed since"]))
    with pytest.raises(IntegrityError, match="is not the engine that was pickled, or was calibrated since"):
        pickle.loads(content)
    shutil.rmtree(engine)
    with pytest.raises(Exception, match="is not a directory"):
        pickle.loads(content)


def test_a_mitigator_pickles(detector):
    for mitigator in (Mitigator.load(provider="cpu", threads=1), Mitigator.for_detector(detector)):
        again = pickle.loads(pickle.dumps(mitigator))
        assert again.engine.directory == mitigator.engine.directory
        assert again.engine.backend.key == mitigator.engine.backend.key


def test_what_was_made_by_hand_says_how_to_go_on(detector):
    with pytest.raises(InputError, match=r"detector of Detector\.load can be pickled: load it in each process"):
        pickle.dumps(Detector(detector.engine))
    with pytest.raises(InputError, match=r"mitigator of Mitigator\.load or for_detector can be pickled"):
        pickle.dumps(Mitigator(detector.engine, detector.gradients))


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")} | environment
    return subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True, timeout=300)


FORK = """
import os, sys
from memedge import Detector, MemedgeError
detector = Detector.load(provider=sys.argv[1], threads=1)
detector.score(["a star"])
child = os.fork()
if not child:
    try:
        detector.score(["a star"])
        detector.score_embeddings(detector.engine.backend.memory.download(detector.engine.encode(
            detector.engine.tokenize(["a star"])[0]).tensor))
        print("scored", flush=True)
    except MemedgeError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
detector.score(["a star"])
"""


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("cpu", "scored"),
        ("openvino", "Provider 'openvino' does not work in a process that was forked after the engine"),
    ],
)
def test_a_forked_child_scores_or_says_why_not(provider, said):
    if provider == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    done = run(f"import sys; sys.argv = ['', {provider!r}]{FORK}", TOKENIZERS_PARALLELISM="false")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)


def test_the_check_of_forks_is_by_process(detector, monkeypatch):
    """Without a fork, which pytest's own threads would not bear."""
    monkeypatch.setattr(detector.engine.backend, "forks", False)
    parent = os.getpid()
    detector.score(PROMPTS)
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(ProviderError, match="open it in each process, start processes by spawn, or use provider 'cpu'"):
        detector.score(PROMPTS)


ENDS = """
import sys, threading, time
from memedge import Detector
detector = Detector.load(provider=sys.argv[1])
def work():
    while True:
        detector.score(["a cat", "a dog"] * 20)
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
"""


@pytest.mark.parametrize("provider", ["cpu", "openvino"])
def test_python_ends_while_daemon_threads_score(provider):
    if provider == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    done = run(f"import sys; sys.argv = ['', {provider!r}]{ENDS}")
    assert (done.returncode, done.stderr) == (0, "")


HOMELESS = """
import os, sys
import memedge.cli
sys.argv = ["memedge", "detect", "the left luggage sign", "--provider", "cpu"]
try:
    memedge.cli.main()  # imports everything: Python itself may lie where other users cannot read
except SystemExit:
    print("imported", flush=True)
os.setgroups([]); os.setgid(54321); os.setuid(54321)
memedge.cli.main()
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user id that no user has")
def test_no_home_and_an_unknown_user():
    if not all(folder.stat().st_mode & stat.S_IXOTH for folder in EMBEDDED_ENGINE.parents):
        pytest.skip("memedge is installed where other users cannot read")
    done = run(HOMELESS)
    assert done.returncode == 0, done.stderr
    assert "MEMORIZED" in done.stdout.partition("imported")[2]


def test_processes_share_one_cache(engine):
    """All of them compute ε_0 at once on first use, and each file that is left is whole."""
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    code = (
        f"from memedge import Detector; print(Detector.load({str(engine)!r}, 'openvino', 'fp32', 1).score(['a']).norm)"
    )
    command = [sys.executable, "-c", code]
    together = [subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=300)[0] for process in together}
    assert len(said) == 1 and all(process.returncode == 0 for process in together)
    assert [path.name for path in engine.glob("*openvino*")] == ["baseline.openvino-fp32.safetensors"]
