"""Worker processes: every batch is answered once, whatever happens to a worker, and nothing of them is left."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_scorer import FakeScorer, die_while_opening, refuse_to_open

from memedge.engine import probe
from memedge.engine.errors import InputError, MemedgeError
from memedge.scoring import workers
from memedge.scoring.workers import AHEAD, processes

SUPPORT = Path(__file__).parents[2] / "support"


def batches(count: int, *odd: str) -> list[list[str]]:
    return [[f"batch {i}", f"prompt {i}", *odd[i : i + 1]] for i in range(count)]


def test_every_batch_once_and_no_more_is_read_than_keeps_them_busy():
    given, read, answered = batches(9), 0, 0

    def reading() -> Iterator[list[str]]:
        nonlocal read
        for batch in given:
            read += 1
            assert read - answered <= 2 * AHEAD
            yield batch

    with processes(FakeScorer, 2, "cpu") as team:
        assert team.info == "a fake"
        found = []
        for batch, scores in team.mapper(reading()):
            answered += 1
            found.append(batch)
            assert scores.norm.tolist() == [len(prompt) for prompt in batch]
    assert sorted(found) == sorted(given)


def test_a_worker_that_dies_costs_no_batch(tmp_path, caplog):
    mark = tmp_path / "mark"
    given = batches(8, "sleep", f"kill once {mark}")
    with processes(FakeScorer, 2, "cpu") as team:
        found = [batch for batch, _ in team.mapper(iter(given))]
    assert sorted(found) == sorted(given)
    assert [record.message for record in caplog.records] == [
        "A worker process ended by signal 9: the others go on with its prompts."
    ]


def test_the_last_worker_that_dies_ends_it_in_a_sentence():
    with processes(FakeScorer, 2, "cpu") as team, pytest.raises(MemedgeError) as caught:
        list(team.mapper(iter(batches(8, "sleep", "kill"))))
    assert str(caught.value) == (
        "The last worker process ended by signal 9: go on with --resume, and with fewer --workers if memory ran out."
    )


@pytest.mark.parametrize(
    ("odd", "kind", "words"),
    [("refuse", InputError, "^This prompt is refused: leave it out.$"), ("odd", MemedgeError, r"OddError: odd; ")],
)
def test_what_scoring_raises_is_raised(odd, kind, words):
    with processes(FakeScorer, 1, "cpu") as team, pytest.raises(kind, match=words):
        list(team.mapper(iter(batches(3, "sleep", odd))))


def test_an_engine_that_cannot_be_opened():
    with (
        pytest.raises(InputError, match=r"^The engine cannot be opened: export it again\.$"),
        processes(refuse_to_open, 2, "cpu"),
    ):
        pytest.fail("opened")
    with (
        pytest.raises(MemedgeError, match="ended with exit code 7 while it opened the engine: give fewer"),
        processes(die_while_opening, 1, "cpu"),
    ):
        pytest.fail("opened")


def test_each_worker_sees_one_gpu(monkeypatch):
    """What the processes would inherit; no GPU is needed to see that."""
    seen = []

    gpus = tuple(probe.Gpu(f"GPU {i}", (9, 0), 1) for i in range(2))
    monkeypatch.setattr(probe, "driver", lambda: probe.Driver((13, 0), gpus))
    with pytest.raises(InputError, match="There are 2 GPUs here, and each worker needs one: give --workers 2 at most"):
        processes(FakeScorer, 3, "cuda").__enter__()
    for visible, expected in ((None, ["0", "1"]), ("5,3", ["5", "3"])):
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        else:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for index in range(2):
            with workers._one_gpu(index):
                seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
        assert seen == expected
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
        seen.clear()


def test_workers_end_with_a_job_that_was_killed():
    """Their pipes end with it."""
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from fake_scorer import FakeScorer\n"
        "from memedge.scoring.workers import processes, _map\n"
        "if __name__ == '__main__':\n"
        "    with processes(FakeScorer, 2, 'cpu') as team:\n"
        "        print(*[worker.process.pid for worker in team.mapper.args[0]], flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/")
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
