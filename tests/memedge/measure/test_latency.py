"""`memedge bench`: what it counts, that any draws run, its table, JSON and plot, and one sentence for every mistake."""

import builtins
import dataclasses
import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from command_line import fails, memedge
from PIL import Image

from memedge import Detector, __version__
from memedge.commands.bench import print_bench
from memedge.engine.directory import EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.errors import InputError, MemedgeError
from memedge.measure import latency, peak
from memedge.measure.picture import plot
from memedge.pictures import check_plot

PROMPTS = ["a star", "house, red"]


@pytest.fixture(scope="module")
def measured():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "CALLS", 4)
        patch.setattr(latency, "gemm_gflops", lambda threads, _seconds: 100.0 * threads)
        done = []
        result = latency.measure(None, "cpu", None, 1, [1, 3], [1, 2], lambda *progress: done.append(progress))
    assert done == [(i, 4) for i in range(4)]
    return result


def test_measured(measured):
    flops = EngineDirectory.open(measured.engine).manifest.flops
    assert (measured.provider, measured.precision, measured.threads) == ("cpu", "fp32", 1)
    assert measured.peak_memory_bytes > 10e6
    assert measured.load_s > 0
    assert [(case.draws, case.batch) for case in measured.cases] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for case in measured.cases:
        assert case.calls == 4
        assert 0 < case.p50_s <= case.p95_s <= case.p99_s
        assert case.flops_per_prompt == flops.text_encoder + 2 * case.draws * flops.remaining
        assert case.gemm_fraction == pytest.approx(case.batch * case.flops_per_prompt / case.p50_s / 100e9)
        assert 0 < case.host_fraction < 1
        assert case.host_us == pytest.approx(1e6 * case.host_fraction * case.p50_s)
        assert case.first_call_s > 0
        assert 0 < case.prompts_per_s <= 2 * case.batch / case.p50_s  # half of the calls take the median or more


def test_draws_are_the_engines_own_over_and_over(detector):
    """With three draws that all stand for one, scores are those of one."""
    engine = Engine.open(latency.EMBEDDED_ENGINE, "cpu", None, 1)
    assert engine.draws == 1
    meter = latency.Meter(engine.backend, 1, 3)
    tripled = Detector(latency.with_draws(engine, meter)).score(PROMPTS)
    own = detector.score(PROMPTS)
    np.testing.assert_allclose(tripled.norm, own.norm, rtol=1e-4)
    np.testing.assert_allclose(tripled.alignment, own.alignment, atol=1e-4)
    meter = latency.Meter(engine.backend, 2, 3)
    assert meter.own_rows(np.arange(6)).tolist() == [0, 1, 0, 2, 3, 2]


def test_gpus_have_no_share_of_the_processor(monkeypatch):
    monkeypatch.setattr(latency, "CALLS", 1)
    monkeypatch.setattr(latency, "SECONDS", 0)
    row = dataclasses.replace(latency.PROVIDERS["cpu"], on_gpu=True)
    measured = {**latency.PROVIDERS, "cpu": row}
    monkeypatch.setattr(latency, "PROVIDERS", measured)
    result = latency.measure(None, "cpu", None, 1, [1])
    assert result.gemm_gflops is None
    assert [(case.gemm_fraction, case.calls) for case in result.cases] == [(None, latency.LEAST_CALLS)]


def test_gemm_reports_a_speed():
    assert peak.gemm_gflops(1, 0.01) > 0


def test_table(measured, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_bench(measured)
    out, err = capsys.readouterr()
    assert "…" not in out
    assert len(out.splitlines()) == 2 + len(measured.cases)
    assert "100 GFLOP/s" in err
    cases = [dataclasses.replace(case, gemm_fraction=None) for case in measured.cases]
    print_bench(dataclasses.replace(measured, gemm_gflops=None, cases=cases))
    out, err = capsys.readouterr()
    assert out.count("—") == len(cases)
    assert "GFLOP/s" not in err
    assert "No share of the peak" in err


def test_other_precisions_have_no_share(measured):
    """Nor has a case that is faster than the yardstick, which then is no peak."""
    case = measured.cases[0]
    slow = case.batch * case.flops_per_prompt / case.p50_s / 1e9
    assert latency._compare(case, 1.01 * slow).gemm_fraction == pytest.approx(1 / 1.01)
    assert latency._compare(case, 0.99 * slow).gemm_fraction is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "CALLS", 1)
        patch.setattr(latency, "SECONDS", 0)
        engine = Engine.open(latency.EMBEDDED_ENGINE, "cpu", None, 1)
        engine.backend.precision = "bf16"
        patch.setattr(latency.Engine, "open", lambda *_: engine)
        result = latency.measure(None, "cpu", None, 1, [1])
    assert (result.precision, result.gemm_gflops, result.cases[0].gemm_fraction) == ("bf16", None, None)


def test_a_file_can_be_compared_later(measured):
    assert measured.memedge == __version__
    assert measured.processor
    assert abs(datetime.fromisoformat(measured.date) - datetime.now(UTC)) < timedelta(minutes=30)
    assert measured.load is None or measured.load >= 0


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(measured, tmp_path, suffix):
    path = tmp_path / f"bench.{suffix}"
    plot(dataclasses.replace(measured, checkpoint=r"some/model $\frac$"), path)
    assert list(tmp_path.iterdir()) == [path]
    if suffix == "png":
        with Image.open(path) as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    else:
        assert "</svg>" in path.read_text()


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *rest):
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MemedgeError, match=r"memedge\[eval\]"):
        check_plot(tmp_path / "bench.png")


def test_command(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "CALLS", 4)
    options = ("--provider", "cpu", "--threads", 1, "--batch", "1", "--json", "-o", "b.PNG")
    done = memedge("bench", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == set(latency.Bench.__dataclass_fields__)
    assert [case.keys() == set(latency.Case.__dataclass_fields__) for case in result["cases"]] == [True]
    assert result["threads"] == 1
    assert result["gemm_gflops"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["b.PNG"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--batch", "0"), "--batch 0 is no list"),
        (("--batch", "a,b"), "--batch a,b is no list"),
        (("--batch", ""), "no list"),
        (("--batch", "1,,2"), "no list"),
        (("--batch", "1001"), "from 1 to 1000"),
        (("--batch", "9" * 5000), "from 1 to 1000"),
        (("--draws", "0"), "--draws 0 is no list"),
        (("--draws", "-1"), "no list"),
        (("--output", "bench.pdf"), ".png or .svg"),
        (("--output", "bench"), ".png or .svg"),
        (("--output", "absent/bench.png"), "does not exist"),
        (("--provider", "abacus"), "no provider 'abacus'"),
        (("--engine", "."), "manifest.json"),
    ],
)
def test_mistakes(tmp_path, arguments, words):
    fails(memedge("bench", *arguments, cwd=tmp_path), words)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_plot(tmp_path):
    (tmp_path / "bench.png").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        check_plot(tmp_path / "bench.png")
