"""ScorePrompts on every kind of batch; on Ray itself in an environment of its own, as .ci/run makes it."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from memedge import Detector, InputError, MemedgeError
from memedge.integrations import ray_cluster
from memedge.integrations.ray import NAMES, ScorePrompts
from memedge.integrations.ray_cluster import on_ray
from memedge.scoring.mapper import here

PROMPTS = ["the left luggage sign", "a red bicycle", "the left luggage sign", "", "a very long prompt " * 40]
PLAIN = {"caption": PROMPTS, "row": [5, 6, 7, 8, 9]}


@pytest.fixture(scope="module")
def detector():
    """One that also runs without tests/conftest.py."""
    return Detector.load(provider="cpu", threads=1)


@pytest.fixture(scope="module")
def scores(detector):
    return detector.score(PROMPTS)


class Counted:
    """A detector that notes what it is asked; `calibrated`: or as one that is not."""

    def __init__(self, detector, calibrated=True):
        self.detector, self.calibrated, self.asked = detector, calibrated, []

    def score(self, prompts):
        self.asked.append(list(prompts))
        found = self.detector.score(prompts)
        if self.calibrated:
            return found
        return type(found)(found.norm, found.alignment, None, None, found.truncated, None)


def frames():
    """A batch of each kind, by its name."""
    return {
        "lists": PLAIN,
        "NumPy": {"caption": np.array(PROMPTS, dtype=object), "row": np.array(PLAIN["row"])},
        "NumPy's text": {"caption": np.array(PROMPTS), "row": np.array(PLAIN["row"])},
        "Arrow": pa.table(PLAIN),
        "Arrow's dictionaries": pa.table({**PLAIN, "caption": pa.array(PROMPTS).dictionary_encode()}),
        "pandas": pd.DataFrame(PLAIN, index=[3, 1, 4, 1, 5]),
    }


def plain(batch):
    """Return any batch as lists, with None for NaN."""
    columns = {name: batch[name] for name in (batch.column_names if isinstance(batch, pa.Table) else batch)}
    lists = {name: c.to_pylist() if hasattr(c, "to_pylist") else list(c) for name, c in columns.items()}
    return {name: [None if v is pd.NA or v != v else v for v in values] for name, values in lists.items()}


@pytest.mark.parametrize("kind", frames())
def test_a_batch_comes_back_with_its_scores(kind, detector, scores):
    """Of its own kind, with what detector.score says; equal prompts are scored once; what was given is not changed."""
    batch, counted = frames()[kind], Counted(detector)
    found = ScorePrompts(counted, "caption")(batch)
    assert type(found) is type(batch)
    expected = scores.to_dict()
    assert plain(found) == {**PLAIN, **{name: expected[name] for name in NAMES}}
    assert sum(expected["memorized"]) == 2 and sum(expected["truncated"]) == 1
    assert counted.asked == [["the left luggage sign", "a red bicycle", "", PROMPTS[4]]]
    assert list(plain(batch)) == ["caption", "row"]


def test_types_hang_on_nothing(detector):
    """Neither on what is in a batch, nor on whether the engine is calibrated."""
    for calibrated in (True, False):
        score = ScorePrompts(Counted(detector, calibrated), "caption")
        for count in (5, 0):
            table = score(pa.table(PLAIN).slice(0, count))
            assert [str(table.schema.field(name).type) for name in NAMES] == ["double"] * 3 + ["bool"] * 2
            frame = score(pd.DataFrame(PLAIN)[:count])
            assert [str(frame[name].dtype) for name in NAMES] == ["float64"] * 3 + ["boolean", "bool"]
            lists = score({"caption": PROMPTS[:count]})
            arrays = score({"caption": np.array(PROMPTS[:count], dtype=object)})
            assert [arrays[name].dtype for name in NAMES[:3]] == [np.float64] * 3
            if not calibrated and count:
                assert lists["score"] == lists["memorized"] == arrays["memorized"].tolist() == [None] * 5
                assert (
                    np.isnan(arrays["score"]).all() and table["score"].null_count == table["memorized"].null_count == 5
                )
                assert frame["score"].isna().all() and frame["memorized"].isna().all()


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"text": ["a"]}, "has no column 'caption' but 'text': name the one that holds prompts"),
        ({"caption": ["a"], "score": [1]}, "has a column 'score' already: rename or drop it first"),
        (pa.table({"caption": ["a"], "truncated": [1]}), "has a column 'truncated' already"),
        ({"caption": ["a", None]}, "Row 2 of the batch has NoneType for text in column 'caption': drop such rows"),
        (pa.table({"caption": ["a", None]}), "Row 2 of the batch has NoneType"),
        (pd.DataFrame({"caption": ["a", None]}), "Row 2 of the batch has (float|NoneType)"),
        ({"caption": np.array([b"a"])}, "Row 1 of the batch has bytes"),
        ({"caption": ["a", "\ud800"]}, "Prompt 2 is not valid UTF-8 text"),
        (["a"], "A batch is list: give a mapping of NumPy arrays or lists, a pyarrow.Table or a pandas.DataFrame"),
    ],
)
def test_what_cannot_be_scored_is_said(batch, said, detector):
    with pytest.raises(InputError, match=said):
        ScorePrompts(detector, "caption")(batch)


def test_it_travels(detector, scores):
    again = pickle.loads(pickle.dumps(ScorePrompts(detector)))
    assert again({"prompt": PROMPTS})["score"] == scores.score.tolist()


def test_without_ray_one_sentence(detector, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MemedgeError, match=r"Scoring on Ray needs ray, which is not installed: run .*memedge\[ray\]"):
        on_ray(detector).__enter__()


def test_here_is_the_mapper_of_one_process(detector, scores):
    (found,) = here(detector.score)(iter([PROMPTS]))
    assert found[0] is PROMPTS
    np.testing.assert_array_equal(found[1].score, scores.score)


def batches(count, size, asked=None):
    """Yield batches of different prompts, and note in `asked` how many were."""
    for number in range(count):
        if asked is not None:
            asked.append(number)
        yield [f"picture {row} of a red bicycle" for row in range(number * size, (number + 1) * size)]


def assert_complete(found, detector, count, size):
    """Each batch came once, with what the detector says of it."""
    assert len(found) == count
    by_first = {batch[0]: (batch, scores) for batch, scores in found}
    for batch in batches(count, size):
        seen, scores = by_first[batch[0]]
        assert seen == batch
        np.testing.assert_array_equal(scores.score, detector.score(batch).score)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Ray's processes import from the folder that a driver runs in first: not from a checkout, which has no core."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cluster(elsewhere):  # noqa: ARG001
    """A real cluster: a head that scores nothing, and two nodes of a processor each."""
    pytest.importorskip("ray", reason="Ray is not installed: python -m pip install 'memedge[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    cluster.nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield cluster
    import ray

    ray.shutdown()
    cluster.shutdown()


on_a_cluster = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what Ray warns of is its own


class TestOnACluster:
    pytestmark = on_a_cluster

    def test_nodes_that_die_lose_nothing_and_repeat_nothing(self, cluster, detector, capfd):
        """One node in mid-run, then the last one; a new node comes, and the run goes on there. Ray says nothing."""
        asked, found = [], []
        with on_ray(detector, cluster.address) as mapper:
            for pair in mapper(batches(24, 8, asked)):
                found.append(pair)
                assert len(asked) - len(found) < 4, "read ahead is two batches per actor"
                if len(found) in (6, 12):
                    cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
                if len(found) == 12:
                    cluster.add_node(num_cpus=1)
        assert_complete(found, detector, 24, 8)
        assert "raylet" not in "".join(capfd.readouterr())

    def test_without_a_node_for_an_actor_it_ends(self, cluster, detector, monkeypatch):
        """With a sentence, and not at once: a node may come."""
        monkeypatch.setattr(ray_cluster, "PATIENCE", 20)  # the cluster notices after some 10
        with on_ray(detector, cluster.address) as mapper:
            results = mapper(batches(24, 8))
            next(results)
            for node in cluster.nodes:
                cluster.remove_node(node, allow_graceful=False)
            with pytest.raises(MemedgeError, match="No node of the Ray cluster has 1 CPU for a process that scores: "):
                list(results)

    def test_the_command_goes_on_after_it_and_a_node_were_killed(self, cluster, tmp_path):
        """The rows are those of a run without Ray, and what the journal had is not scored again."""
        source, output, journal = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "out.jsonl.partial"))
        source.write_text("".join(json.dumps({"text": f"picture {i % 700}", "n": i}) + "\n" for i in range(900)))
        line = [sys.executable, "-m", "memedge", "score", source, "--provider", "cpu", "--threads", "1", "--json", "-o"]
        plain = tmp_path / "plain.jsonl"
        subprocess.run([*line, plain], check=True, capture_output=True)
        on_cluster = [*line, output, "--ray", cluster.address]
        with subprocess.Popen(on_cluster, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and not (journal.exists() and journal.stat().st_size > 16_384):
                time.sleep(0.01)
            process.kill()
        assert not output.exists()
        with subprocess.Popen([*on_cluster, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            size = journal.stat().st_size
            while process.poll() is None and journal.stat().st_size == size:
                time.sleep(0.01)
            cluster.remove_node(cluster.nodes.pop(), allow_graceful=False)
            said, _ = process.communicate(timeout=240)
        summary = json.loads(said)
        assert (summary["rows"], summary["unique"]) == (900, 700) and 0 < summary["scored_now"] < 700
        rows, expected = ([json.loads(line) for line in path.open()] for path in (output, plain))
        for row, other in zip(rows, expected, strict=True):
            assert (row["prompt"], row["n"], row["memorized"]) == (other["prompt"], other["n"], other["memorized"])
            assert row["norm"] == pytest.approx(other["norm"], rel=1e-4, abs=1e-4)

    @pytest.mark.parametrize("batch_format", ["numpy", "pyarrow"])
    def test_map_batches(self, cluster, detector, batch_format):
        """By two actors."""
        import ray

        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        prompts = [f"picture {row} of a red bicycle" for row in range(60)] + [""]
        scored = ray.data.from_arrow(pa.table({"caption": prompts, "id": range(61)})).map_batches(
            ScorePrompts,
            fn_constructor_args=(detector, "caption"),
            batch_size=16,
            batch_format=batch_format,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=2),
        )
        found = scored.to_pandas().sort_values("id", ignore_index=True)
        assert found["caption"].tolist() == prompts
        expected = detector.score(prompts).to_dict()
        for name in NAMES:
            assert found[name].tolist() == expected[name], name


ABORT = "__import__('os').abort()"


class Opened:
    """In place of a detector: an expression, which the process evaluates that opens it."""

    info = SimpleNamespace(provider="cpu", threads=os.cpu_count())

    def __init__(self, expression):
        self.expression = expression

    def __reduce__(self):
        return eval, (self.expression,)


class TestOnThisMachine:
    pytestmark = on_a_cluster

    @pytest.fixture(autouse=True)
    def ray(self, elsewhere):  # noqa: ARG002
        return pytest.importorskip("ray", reason="Ray is not installed: python -m pip install 'memedge[ray]'")

    def test_a_cluster_of_its_own_comes_and_goes(self, ray, detector, capfd):
        """Two runs on it; an error of the scoring is as it was raised; signals are as before; nothing is printed."""
        before = signal.getsignal(signal.SIGTERM)
        with on_ray(detector) as mapper:
            assert ray.is_initialized() and signal.getsignal(signal.SIGTERM) is before
            for _ in range(2):
                assert_complete(list(mapper(batches(5, 4))), detector, 5, 4)
            assert list(mapper(iter([]))) == []
            with pytest.raises(InputError, match=r"^Prompt 2 is NoneType, not text: give strings only\.$") as raised:
                list(mapper(iter([["a", None]])))
            assert type(raised.value) is InputError
            with pytest.raises(InputError, match="connected to a Ray cluster already: leave the address out"):
                on_ray(detector, "auto").__enter__()
        assert not ray.is_initialized()
        assert "".join(capfd.readouterr()) == ""

    def test_a_connection_that_was_there_stays(self, ray, detector):
        ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
        try:
            for _ in range(2):  # the first one's actors leave room
                with on_ray(detector) as mapper:
                    assert_complete(list(mapper(batches(2, 2))), detector, 2, 2)
                assert ray.is_initialized()
        finally:
            ray.shutdown()

    def test_it_goes_when_the_run_is_cut_off(self, ray, detector):
        for end in (KeyboardInterrupt, SystemExit):
            with pytest.raises(end), on_ray(detector) as mapper:
                next(mapper(batches(5, 4)))
                raise end
            assert not ray.is_initialized()

    @pytest.mark.parametrize(
        ("opened_as", "said"),
        [
            (f"__import__('types').SimpleNamespace(score=lambda prompts: {ABORT})", "to score the same prompts"),
            (ABORT, "to open the engine"),
        ],
    )
    def test_what_kills_its_process_ends_the_run(self, opened_as, said, monkeypatch):
        monkeypatch.setattr(ray_cluster, "PATIENCE", 3)
        with (
            on_ray(Opened(opened_as)) as mapper,
            pytest.raises(MemedgeError, match=rf"^\d processes on the Ray cluster ended when they were {said} "),
        ):
            list(mapper(batches(1, 1)))

    def test_an_engine_that_is_not_there_is_said(self):
        said = "^A node of the Ray cluster cannot open the engine: /nowhere is not a directory"
        with (
            on_ray(Opened("__import__('memedge').Detector.load('/nowhere')")) as mapper,
            pytest.raises(MemedgeError, match=said),
        ):
            list(mapper(batches(1, 1)))

    @pytest.mark.parametrize("address", ["auto", "127.0.0.1:1", "nonsense", "[::1]:99999"])
    def test_no_cluster_is_one_sentence(self, address, detector, monkeypatch):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # which auto looks for first
        with pytest.raises(InputError, match=r"^There is no Ray cluster at .* that this process can use \(") as raised:
            on_ray(detector, address).__enter__()
        assert "\n" not in str(raised.value)
