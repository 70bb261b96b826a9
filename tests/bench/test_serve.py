"""bench/serve.py, short: every line of it runs, and says what it measured."""

import json
import sys

import pytest


@pytest.mark.slow
def test_measures_what_it_says(tmp_path, monkeypatch, capsys):
    import serve

    monkeypatch.setattr(serve, "ROUNDS", 1)
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["serve.py", "--seconds", "2", "--requests", "20", "--json", str(path)])
    serve.main()
    found = json.loads(path.read_text())
    assert [load["times"] for load in found["loads"]] == [0.5, 1, 2, 4]
    assert all(load["goodput"] <= load["offered"] and load["p50"] <= load["p99"] for load in found["loads"])
    assert found["coalescing"] > 0 and found["resident_after"] > 1e7
    said = capsys.readouterr().out
    assert "cpu-fp32, 1 threads" in said and "verdicts/s" in said
