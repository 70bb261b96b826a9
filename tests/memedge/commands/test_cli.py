"""The command line as a whole: its commands and options, what it loads, exit codes, one sentence for every mistake."""

import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import fails, memedge, memedge_process

from memedge import __version__, commands
from memedge.commands import terminal
from memedge.commands.export import height_and_width
from memedge.commands.options import app
from memedge.engine.providers import PROVIDERS

SHARED = {
    "descriptions",
    "early_scorer",
    "failures",
    "histogram",
    "optional_value",
    "options",
    "score_output",
    "terminal",
    "training_options",
}
COMMANDS = [command.callback.__name__ for command in app.registered_commands]
CPU = ("--provider", "cpu")
LISTS = ("--memorized", "m.txt", "--clean", "c.txt")
OPENING = [
    name for name in COMMANDS if name not in ("export", "build", "triton", "merge", "audit", "cure")
]  # an engine


def test_every_file_is_a_command():
    assert set(COMMANDS) == {module.name for module in pkgutil.iter_modules(commands.__path__)} - SHARED
    text = memedge("--help").stdout
    places = [text.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "Exit codes" in text
    assert "..." not in text.partition("Commands:")[2]  # each summary is whole


def test_version():
    done = memedge("--version")
    assert (done.returncode, done.stdout) == (0, f"memedge {__version__}\n")


def test_lines_break_between_words_in_a_terminal(monkeypatch, capsys):
    """And not at all where a program reads them."""
    text = "Memorized: a score of at least 3.441" + ", the threshold calibrated for openvino-bf16" * 3
    monkeypatch.setenv("COLUMNS", "80")
    terminal.say(text)
    assert capsys.readouterr().err == f"{text}\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    terminal.say(text)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 80
    assert " ".join(line.strip() for line in lines) == text


@pytest.mark.parametrize("command", COMMANDS)
def test_options(command):
    done = memedge(command, "--help")
    assert done.returncode == 0
    text = " ".join(done.stdout.split())
    assert ("--json " in text) == (command != "serve")
    if command in OPENING:
        assert all(f"{option} " in text for option in ("--engine", "--provider", "--precision", "--threads"))
        assert f"{', '.join(PROVIDERS)}, or auto" in text
    if command in ("build", "triton"):
        assert all(f"{option} " in text for option in ("--engine", "--provider"))


def test_help_loads_little():
    code = "import sys; from memedge.cli import main; sys.argv = ['memedge', 'detect', '--help']\n"
    code += "try: main()\nexcept SystemExit: print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert "typer" in loaded
    assert not {"numpy", "rich", "tokenizers", "msgspec", "PIL"} & set(loaded)


def test_mistakes(engine, tmp_path):
    damaged = shutil.copytree(engine, tmp_path / "damaged")
    (damaged / "unet.onnx.data").write_bytes(b"")
    for arguments, words in [
        (("detect", "a", "--engine", tmp_path), "holds no manifest.json"),
        (("detect", "a", "--engine", damaged), "bytes instead of"),
        (("detect", "a", "--provider", "abacus"), "no provider 'abacus'"),
        (("detect", "a", "--provider", "cuda"), "Provider 'cuda' needs onnxruntime-gpu"),
        (("detect", "a", "--precision", "fp16", *CPU), "is an fp32 engine"),
        (("detect", b"\xff".decode(errors="surrogateescape"), *CPU), "UTF-8"),
        (("demo", "-o", tmp_path / "absent" / "demo.png"), "does not exist"),
        (("demo", "-o", "/proc/demo.png", *CPU), "/proc/demo.png"),
        (("export", "model", "-o", tmp_path / "new", "--size", "1024"), "--size 1024 is no size"),
    ]:
        fails(memedge(*arguments), words)


def test_sizes_have_the_width_first():
    assert height_and_width("1024x768") == height_and_width("1024X768") == (768, 1024)


def test_two_engines(engine):
    for command in (
        ("info", engine),
        ("calibrate", engine, *LISTS),
        ("evaluate", engine, *LISTS, "-o", "report"),
        ("build", engine, "--provider", "tensorrt-rtx"),
        ("triton", engine, "-o", "models"),
    ):
        fails(memedge(*command, "--engine", engine), "Two engine directories")


@pytest.mark.parametrize(
    ("module", "arguments", "purpose", "extra"),
    [
        ("memedge.evaluation.evaluate", ("evaluate", *LISTS, "-o", "report"), "Evaluating", "eval"),
        ("memedge.export.export", ("export", "model", "-o", "engine"), "Exporting", "cpu,export"),
        ("memedge.export.tensorrt", ("build", "--provider", "tensorrt-rtx"), "Building", "tensorrt-rtx"),
    ],
)
def test_what_is_not_installed(monkeypatch, module, arguments, purpose, extra):
    monkeypatch.setitem(sys.modules, module, None)
    words = f"{purpose} needs {module!r}, which is not installed: run `python -m pip install 'memedge[{extra}]'`."
    fails(memedge(*arguments), words)


def test_wrong_usage():
    for arguments, words in [
        (("detect",), "PROMPT"),
        (("detect", "a", "--threads", 0), "--threads"),
        (("detect", "a", "--sharpness"), "No such option"),
        (("calibrate", *LISTS), "ENGINE_DIR"),
        (("build",), "--provider"),
        (("build", "--provider", "cuda"), "tensorrt-rtx"),
        (("bogus",), "No such command"),
    ]:
        fails(memedge(*arguments), words, code=2)


@pytest.mark.parametrize("module", ["memedge", "memedge.cli"])
def test_in_a_process(tmp_path, module):
    """What a shell sees is what the tests in this process see. Interrupts: tests/export/test_export.py."""
    assert memedge_process("--help", module=module).returncode == 0
    fails(memedge_process("detect", "a", "--engine", tmp_path, module=module), "holds no manifest.json")
    fails(memedge_process("detect", module=module), "PROMPT", code=2)


def test_full_disk():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "memedge.cli", "detect", "a star", "--json", *CPU]
        done = subprocess.run(command, cwd="/", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
