"""bench/serve_triton.py, short: every line of it runs, and says what it measured."""

import re
import sys

import pytest


@pytest.mark.slow
def test_measures_what_it_says(triton_environment, monkeypatch, capsys):
    import serve_triton

    monkeypatch.setattr(serve_triton, "ROUNDS", 1)
    monkeypatch.setenv("MEMEDGE_TEST_TRITON", str(triton_environment))
    monkeypatch.setattr(sys, "argv", ["serve_triton.py", "--seconds", "2", "--requests", "40"])
    serve_triton.main()
    said = capsys.readouterr().out
    numbers = [float(number) for number in re.findall(r"([\d.]+) (?:prompts/s|prompts a call|MB)", said)]
    assert len(numbers) == 5 and all(number > 0 for number in numbers), said
