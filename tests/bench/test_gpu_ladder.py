"""bench/gpu_ladder.py on the processor, where every line of it but CUDA's own runs too."""

import json
import sys

import pytest


@pytest.mark.slow
def test_measures_every_rung_of_every_case(checkpoint, engine, tmp_path, monkeypatch, capsys):
    import gpu_ladder

    path = tmp_path / "rungs.json"
    command = ["gpu_ladder.py", str(checkpoint), str(engine), "--provider", "cpu", "--device", "cpu"]
    options = ["--prompts", "1,2", "--draws", "1", "--rows", "0,2,64", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command + options)
    gpu_ladder.main()
    rungs = [(r["prompts"], r["rung"]) for r in json.loads(path.read_text())]
    torch = ["published", "minimal", "published, channels-last", "minimal, channels-last"]
    engines = {1: [2], 2: [4, 2]}
    assert rungs == [(n, r) for n in (1, 2) for r in [*torch, *(f"engine, {rows} rows" for rows in engines[n])]]
    assert "cpu-fp32: norm" in capsys.readouterr().out


def test_an_engine_that_is_not_the_method_fails():
    import gpu_ladder
    import numpy as np

    right = np.array([2.0]), np.array([0.1])
    gpu_ladder.compare("engine", right, right, "fp32")
    for wrong in ((right[0] * 1.01, right[1]), (right[0], right[1] + 0.01), (right[0] * np.nan, right[1])):
        with pytest.raises(SystemExit, match="engine is not the published method"):
            gpu_ladder.compare("engine", wrong, right, "fp32")
