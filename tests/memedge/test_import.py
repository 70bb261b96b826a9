"""What importing and using memedge loads, how long it takes, and that a checkout works uninstalled."""

import subprocess
import sys
from pathlib import Path

import pytest

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


def test_all_names_exist():
    import memedge

    for name in memedge.__all__:
        assert getattr(memedge, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'detector_'"):
        memedge.detector_  # noqa: B018


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


def test_missing_dependency_is_one_sentence(tmp_path):
    (tmp_path / "msgspec.py").write_text("raise ModuleNotFoundError(\"No module named 'msgspec'\", name='msgspec')")
    code = "import memedge\ntry: memedge.Detector\nexcept ImportError as error: print(error)"
    assert run(code, tmp_path).startswith("memedge needs 'msgspec', which is not installed: run")
