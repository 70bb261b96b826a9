"""Text that is not ours on a terminal, in JSON, in errors; and the last catch."""

import io
import json
import sys

import pytest
from command_line import fails, memedge, memedge_process
from hypothesis import given
from hypothesis import strategies as st

from memedge.commands import failures, terminal
from memedge.plain import LONGEST, one_line, plain

CPU = ("--provider", "cpu")
NASTY = "a\x1b]0;title\x07\x1b[31mb\u009b2J\u202ec\ud800\n\r\x7fd"


def test_what_a_terminal_acts_on_is_escaped():
    assert plain(NASTY) == r"a\x1b]0;title\x07\x1b[31mb\x9b2J\u202ec\ud800\n\r\x7fd"
    for text in ("a cat", "日本の 猫", "全角\u3000空白", "👩\u200d🚀", "नमस्\u200dते", "\u00a0é", r"a\x1b"):
        assert plain(text) == text


@given(st.text())
def test_nothing_passes_that_moves_the_cursor(text):
    assert not [
        char for char in plain(text) if ord(char) < 32 or 127 <= ord(char) < 160 or "\u202a" <= char <= "\u202e"
    ]
    assert len(one_line(text * 99)) <= LONGEST
    assert len(one_line(text).splitlines()) <= 1


def test_tables_and_json_hold_no_control_characters():
    done = memedge("detect", NASTY.replace("\ud800", ""), "猫", *CPU, COLUMNS="200")
    assert "\x1b" not in done.stdout and "\u202e" not in done.stdout
    assert r"\x1b[31mb" in done.stdout and r"\u202e" in done.stdout
    done = memedge("detect", "a\x1b\u009b\u202e猫", *CPU, "--json")
    assert json.loads(done.stdout)[0]["prompt"] == "a\x1b\u009b\u202e猫"
    assert "猫" in done.stdout and not {"\x1b", "\u009b", "\u202e"} & set(done.stdout)


def test_errors_hold_no_control_characters(tmp_path):
    fails(memedge("detect", "a", "--engine", tmp_path / "x\x1b[31m\ny"), r"x\x1b[31m")
    fails(memedge("score", tmp_path / "x\x1b.txt", "-o", tmp_path / "o.csv", *CPU), r"x\x1b.txt does not exist")
    fails(memedge("detect", "--\x1b[31mx"), r"--\x1b[31mx", code=2)


def test_a_terminal_that_shows_ascii_only():
    ascii_only = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = memedge_process("detect", "a 猫", *CPU, **ascii_only)
    assert done.returncode == 0, done.stderr
    assert "a ?" in done.stdout
    done = memedge_process("detect", "a 猫", *CPU, "--json", **ascii_only)
    assert json.loads(done.stdout)[0]["prompt"] == "a 猫"
    assert done.stdout.isascii()


def test_json_of_what_the_output_lacks(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    terminal.print_json(["é", "🐈", "\\"])
    out.flush()
    text = out.buffer.getvalue().decode("latin-1")
    assert json.loads(text) == ["é", "🐈", "\\"]
    assert "é" in text and r"\ud83d\udc08" in text


def raiser(error: BaseException, module: str = "memedge.commands.doctor"):
    """Return a function of another module that raises."""
    scope = {"__name__": module, "error": error}
    exec("def fail(*_, **__): raise error", scope)
    return scope["fail"]


class PanicException(BaseException):
    """As libraries in Rust raise it."""


PanicException.__module__ = "pyo3_runtime"


@pytest.mark.parametrize(
    ("error", "module", "words"),
    [
        (
            KeyError("x"),
            "somelib.inner",
            "memedge: the library somelib failed (KeyError: 'x'): run `memedge --debug …`",
        ),
        (ValueError("two\nlines \x1b[31m"), "json.decoder", r"memedge itself failed (ValueError: two lines \x1b[31m)"),
        (MemoryError(), "numpy", "the library numpy failed (MemoryError): "),
        (PanicException("slice"), "x", "the library pyo3_runtime failed (PanicException: slice)"),
        (
            OSError("a model that\nis not there"),
            "hub.api",
            "the library hub failed (OSError: a model that is not there)",
        ),
        (RuntimeError("w" * 9999), "somelib", "…): run"),
    ],
)
def test_whatever_is_raised_ends_in_one_sentence(monkeypatch, error, module, words):
    monkeypatch.setattr("memedge.doctor.examine", raiser(error, module))
    done = memedge("doctor")
    fails(done, words)
    assert len(done.stderr) < LONGEST + 20
    done = memedge("--debug", "doctor")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and words in done.stderr


def test_the_library_is_that_of_the_class_first():
    kind = type("Fail", (Exception,), {"__module__": "onnx.checker"})
    assert "the library onnx failed (Fail: no)" in failures.sentence(kind("no"))


def test_an_interrupt_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("memedge.doctor.examine", raiser(KeyboardInterrupt()))
    done = memedge("doctor")
    assert (done.returncode, done.stderr) == (130, "memedge: interrupted\n")
    monkeypatch.setattr("memedge.scoring.job.run", raiser(KeyboardInterrupt()))
    (tmp_path / "p.txt").write_text("a\n")
    done = memedge("score", tmp_path / "p.txt", "-o", tmp_path / "o.csv", *CPU)
    assert done.returncode == 130
    assert done.stderr == "memedge: interrupted: what is scored is kept, go on with --resume\n"


def test_a_reader_that_has_enough(monkeypatch):
    monkeypatch.setattr("memedge.doctor.examine", raiser(BrokenPipeError(32, "Broken pipe")))
    done = memedge("doctor")
    assert (done.returncode, done.stderr) == (1, "")


def test_without_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    terminal.print_json([1])  # a shell's `>&-`
