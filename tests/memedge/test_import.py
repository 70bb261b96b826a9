"""What importing and using memedge loads, how long it takes, and that a checkout works uninstalled."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType
from typing import get_args, get_type_hints

import pytest

import memedge
from memedge.engine.engine import Engine
from memedge.engine.gradients import Gradients
from memedge.engine.precision import Tolerance

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "diffusers", "onnx", "onnxscript", "plotly", "scipy", "sklearn", "pyarrow", "PIL")


def run(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "code", ["import memedge", "import memedge.cli", "from memedge import Detector; Detector.load().score(['a star'])"]
)
def test_nothing_heavy_is_loaded(tmp_path, code):
    loaded = run(f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))", tmp_path).split()
    assert not set(HEAVY) & set(loaded)


@cache
def declared() -> dict[str, object]:
    """Return what type checkers are told to be public: name → the thing itself."""
    tree = ast.parse(Path(memedge.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    found: dict[str, object] = {}
    exec(compile(ast.Module(block.body, []), "declared", "exec"), found)
    return {name: value for name, value in found.items() if not name.startswith("_")}


def test_the_public_names_are_what_type_checkers_are_told():
    """Also once all submodules are imported, which sets attributes of the package."""
    names = declared()
    assert memedge.__all__ == sorted(names)
    for name, value in names.items():
        assert getattr(memedge, name) is value
    assert isinstance(memedge.export, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'detector_'"):
        memedge.detector_  # noqa: B018


def parts(annotation: object) -> Iterator[type]:
    """Yield the classes in an annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        for one in part if isinstance(part, list) else [part]:
            yield from parts(one)


def annotations(thing: object) -> Iterator[object]:
    """Yield the types of what a user sees of a class or a function: attributes, arguments, results."""
    names = {"DataFrame": object}  # which type checkers alone import
    if isinstance(thing, type):
        yield from get_type_hints(thing, localns=names).values()
        methods = [value for name, value in vars(thing).items() if name[0] != "_"]
        methods = [getattr(m, "fget", None) or getattr(m, "func", None) or getattr(m, "__func__", m) for m in methods]
    else:
        methods = [thing]
    for method in methods:
        if isinstance(method, FunctionType):
            yield from get_type_hints(method, localns=names).values()


def test_what_public_names_are_made_of_is_public():
    """Every class of ours that a public annotation names; but for what is below the face, in memedge.engine."""
    public = declared()
    below = {Engine, Gradients, Tolerance}
    assert {"Detector", "calibrate", "Scores", "Rule"} <= public.keys()
    for name, thing in public.items():
        ours = {part for one in annotations(thing) for part in parts(one) if part.__module__.startswith("memedge")}
        assert ours - below <= set(filter(callable, public.values())), name


@pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests do not lie in a checkout")
def test_checkout_works_uninstalled():
    """From a checkout's root, the checkout's own code runs, on the NumPy path."""
    code = (
        "import memedge, memedge.engine.manifest as m; print(memedge.__file__, m.__file__, sep='\\n');"
        "from memedge import Detector; print(len(Detector.load().score(['a star'])))"
    )
    package, manifest, count = run(code, ROOT).splitlines()
    assert Path(package).resolve().is_relative_to(ROOT)
    assert Path(manifest).resolve().is_relative_to(ROOT)
    assert count == "1"


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("Detector", "msgspec", "cpu"), ("evaluate", "scipy", "cpu,eval"), ("export_engine", "torch", "cpu,export")],
)
def test_missing_dependency_is_one_sentence(tmp_path, name, package, extra):
    missing = f"raise ModuleNotFoundError(\"No module named '{package}'\", name='{package}')"
    (tmp_path / f"{package}.py").write_text(missing)
    said = run(f"import memedge\ntry: memedge.{name}\nexcept ImportError as error: print(error)", tmp_path)
    assert said.startswith(f"memedge.{name} needs '{package}', which is not installed: run `python -m pip install ")
    assert said.count(f"memedge[{extra}]") == 1
