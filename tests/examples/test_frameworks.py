"""The recipes of docs/frameworks.md in the real libraries, which CI installs in an environment of their own.

They are marked `py`, because blocks marked `python` run where these libraries are not.
"""

import re
import shutil
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/frameworks.md"
BLOCKS = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
PROMPTS = [f"a red bicycle {row % 20}" for row in range(40)] + ["the left luggage sign"]

# What the libraries warn of is their own.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the block that imports a library, in a folder with captions; return its names."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions").mkdir()
    for part in range(2):
        rows = range(part, len(PROMPTS), 2)
        table = pa.table({"caption": [PROMPTS[row] for row in rows], "row": list(rows)})
        parquet.write_table(table, tmp_path / f"captions/{part}.parquet")

    def run(library: str) -> dict:
        names: dict = {}
        (block,) = (one for one in BLOCKS if re.search(rf"^(import|from) {library}\b", one, re.MULTILINE))
        exec(block, names)
        return names

    return run


def assert_scored(rows: list[dict]) -> None:
    """All rows are there, with the other column and what a detector says."""
    from memedge import Detector

    rows = sorted(rows, key=lambda row: row["row"])
    assert [row["caption"] for row in rows] == PROMPTS
    expected = Detector.load().score(PROMPTS)
    for name in ("norm", "alignment", "score", "memorized", "truncated"):
        assert [row[name] for row in rows] == pytest.approx(getattr(expected, name).tolist(), rel=1e-5), name
    assert sum(row["memorized"] for row in rows) == 1


def written(folder: str) -> list[dict]:
    from pyarrow import parquet

    return parquet.read_table(folder).to_pylist()


def test_ray_data(run):
    ray = pytest.importorskip("ray", reason="Ray is not installed: python -m pip install 'memedge[ray]'")
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    try:
        run("ray")
    finally:
        ray.shutdown()
    assert_scored(written("scored"))


def test_datasets(run, tmp_path, monkeypatch):
    """And its cache knows the engine: the same one is not asked again, and another threshold is another function."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: python -m pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = run("datasets")
    assert_scored(names["scored"].to_list())
    detector, scorer = names["Detector"].load(), names["ScorePrompts"]
    again, strict = (
        names["captions"].map(scorer(one, "caption"), batched=True, batch_size=256)
        for one in (detector, detector.at(threshold=-100))
    )
    assert again._fingerprint == names["scored"]._fingerprint
    assert strict._fingerprint != names["scored"]._fingerprint and sum(strict["memorized"]) == len(PROMPTS)


def test_spark(run):
    pytest.importorskip("pyspark", reason="Spark is not installed: python -m pip install pyspark")
    if not shutil.which("java"):
        pytest.skip("Spark needs Java")
    names = run("pyspark")
    names["spark"].stop()
    assert_scored(written("scored-by-spark"))


def test_daft(run):
    pytest.importorskip("daft", reason="Daft is not installed: python -m pip install daft")
    run("daft")
    assert_scored(written("scored-by-daft"))


def test_on_ray(run, capsys):
    pytest.importorskip("ray", reason="Ray is not installed: python -m pip install 'memedge[ray]'")
    run("memedge.integrations.ray_cluster")
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "['a green star'] [False]",
        "['the left luggage sign', 'a red bicycle'] [ True False]",
    ]
