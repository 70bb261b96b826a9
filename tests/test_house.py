"""The house: who may import whom, no circles, and every package in the wheel (docs/architecture.md)."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import memedge

ROOT = Path(memedge.__file__).parent
CHECKOUT = Path(__file__).parents[1]

# Each package of the house, and what it may import; the lower ones come last. A package may import itself.
RUN_TIME = ("decision", "detector", "embedded", "engine", "guidance", "pictures", "prompts", "results", "wording")
MAY_IMPORT = {
    "cli": ("commands", "engine", "plain"),
    "commands": ("*", "export"),
    "integrations": (*RUN_TIME, "mitigation", "monitor", "protocol", "scoring", "tables"),
    "monitor": ("calibration", "decision", "engine", "integrations", "metrics", "wording"),
    "server": (*RUN_TIME, "explain", "protocol", "reports", "serving"),
    "serving": RUN_TIME,
    "mitigation": (*RUN_TIME, "autograd"),
    "evaluation": (*RUN_TIME, "detectors", "metrics", "reports", "scoring"),
    "calibration": (*RUN_TIME, "metrics", "scoring"),
    "measure": RUN_TIME,
    "training": ("audit", "autograd", "engine", "integrations"),
    "audit": ("autograd", "engine", "plain", "prompts", "reports", "scoring", "wording"),
    "doctor": ("detector", "embedded", "engine"),
    "demo": ("embedded", "engine", "results"),
    "heat": ("engine", "explain"),
    "detector": ("decision", "embedded", "engine", "explain", "prompts", "results", "wording"),
    "explain": ("decision", "engine"),
    "scoring": ("engine", "plain", "prompts", "reports", "results", "wording"),
    "detectors": ("autograd", "decision", "engine", "guidance", "prompts"),
    "autograd": ("engine", "export"),
    "export": ("embedded", "engine", "metrics", "prompts", "wording"),
    "decision": ("engine", "results"),
    "prompts": ("decision", "engine"),
    "guidance": ("engine",),
    "pictures": ("engine",),
    "reports": ("embedded",),
    "protocol": ("results",),
    "results": ("engine", "tables"),
    "tables": ("engine",),
    "embedded": (),
    "metrics": (),
    "plain": (),
    "wording": (),
    "engine": (),
}


def modules() -> dict[str, Path]:
    """Every module of the installed package by name, such as "engine.ort"; packages by their own."""
    paths = {path.relative_to(ROOT): path for path in ROOT.rglob("*.py")}
    return {".".join(short.with_suffix("").parts).removesuffix(".__init__"): path for short, path in paths.items()}


def imports(path: Path, everywhere: bool) -> Iterator[str]:
    """Yield what a module imports of memedge; `everywhere`: also within functions, but never for types alone."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "memedge":
            base = (node.module or "").removeprefix("memedge").removeprefix(".")
            yield from (f"{base}.{alias.name}".removeprefix(".") for alias in node.names)
        pending += ast.iter_child_nodes(node)


def test_arrows_point_down():
    wrong = []
    for name, path in modules().items():
        package = name.split(".")[0]
        if package in ("__init__", "__main__", ""):
            continue
        allowed = MAY_IMPORT[package]
        for imported in imports(path, everywhere=True):
            other = imported.split(".")[0]
            known = other in MAY_IMPORT and other != package
            if known and other not in allowed and not ("*" in allowed and other not in ("cli", "export")):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, wrong


def test_no_circles():
    """Modules that import each other when they are loaded."""
    known = modules()
    arrows = {}
    for name, path in known.items():
        found = {one if one in known else one.rpartition(".")[0] for one in imports(path, everywhere=False)}
        arrows[name] = {one for one in found if one in known and one not in (name, "")}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_run_time_never_needs_export():
    """Where memedge.export cannot be imported, all that scores still can."""
    code = (
        "import sys; sys.modules['memedge.export'] = None\n"
        "import memedge.detectors, memedge.mitigation.mitigator, memedge.scoring.job, memedge.measure.latency\n"
        "import memedge.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", env=dict(os.environ))


def test_every_package_is_installed():
    folders = {"engine": CHECKOUT / "engine", "export": CHECKOUT / "export", "": CHECKOUT / "memedge"}
    for name, folder in folders.items():
        for path in folder.rglob("*.py"):
            assert (ROOT / name / path.relative_to(folder)).is_file(), path.relative_to(CHECKOUT)
