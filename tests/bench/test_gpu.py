"""bench/gpu.py on the processor, where every line of it but CUDA's own runs too."""

import json
import sys

import pytest

from memedge.engine.manifest import read_manifest


def test_measures_what_it_says(engine, tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setattr("memedge.measure.latency.CALLS", 3)
    path = tmp_path / "results.json"
    command = ["gpu.py", str(engine), "--provider", "cpu", "--calls", "20", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    gpu.main()
    found = json.loads(path.read_text())["providers"]["cpu"]
    assert found["agreement"]["norm_relative"] == 0
    tokens, rows = 16, 2
    assert sorted(found["transfers"]["to_device"]) == [8 * rows, 8 * rows, 8 * tokens]
    assert found["transfers"]["from_device"] == [3 * 8 * rows]
    assert len(found["screen_s"]) == len(read_manifest(engine).taps) > 0
    assert [case["batch"] for case in found["latency"]] == [1, 4, 16]
    assert len(found["soak"]["process_MiB"]) == 2
    assert "cpu-fp32" in capsys.readouterr().out


def test_a_machine_without_gpus_says_so_for_every_provider(engine, monkeypatch, capsys):
    import gpu

    from memedge.engine import probe

    if probe.driver().gpus:
        pytest.skip("there is a GPU here")
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(engine)])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    for provider in ("tensorrt", "tensorrt-rtx", "cuda"):
        assert f"{provider}: not measured: " in said


def test_what_is_wrong_is_a_problem():
    import gpu

    agreed = {"norm_relative": 1e-3, "alignment_absolute": 0.0, "allowed_norm": 1e-2, "allowed_alignment": 1e-2}
    soaked = {"calls": 9, "process_MiB": [100.0, 101.0], "device_MiB": None}
    result = {"agreement": agreed, "soak": soaked}
    assert gpu.problems(result) == []
    for change in ({"norm_relative": 0.1}, {"norm_relative": float("nan")}, {"alignment_absolute": 0.1}):
        assert len(gpu.problems(result | {"agreement": agreed | change})) == 1
    (problem,) = gpu.problems(result | {"soak": soaked | {"device_MiB": [100.0, 150.0]}})
    assert problem == "Memory (device) grew by 50 MiB in 9 calls."
