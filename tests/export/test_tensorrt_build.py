"""Real plans, which TensorRT-RTX builds without a GPU, and every refusal. TensorRT itself cannot be installed here: its
way through the code is taken by TensorRT-RTX in its place, which has all the names (test_tensorrt_names.py)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import onnx
import pytest
from command_line import fails, memedge
from engines import edit_manifest, list_file

from memedge.commands.build import print_plans
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine import plans
from memedge.engine.directory import TEXT_ENCODER, EngineDirectory
from memedge.engine.errors import InputError, ProviderError
from memedge.export import tensorrt
from memedge.export.tensorrt import build

EMBEDDED_MODEL = Path(__file__).parents[2] / "bench" / "tiny" / "emoji"
TARGETS = ("sm86", "sm120")  # TensorRT-RTX multiplies float32 on no SM75


@pytest.fixture(scope="module")
def trt():
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: memedge[tensorrt-rtx]")


@pytest.fixture(scope="module")
def built(trt, tmp_path_factory):  # noqa: ARG001  # where it is not installed, this is skipped
    """The embedded engine's plans, built by the command line: the folder, and what was printed."""
    folder = shutil.copytree(EMBEDDED_ENGINE, tmp_path_factory.mktemp("built") / "engine")
    done = memedge("build", "--engine", folder, "--provider", "tensorrt-rtx", "--gpu", "SM86,sm120", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine", ignore=shutil.ignore_patterns("plans"))


@pytest.fixture
def text_alone(monkeypatch):
    """The text encoder builds ten times as fast."""
    monkeypatch.setattr(tensorrt, "FILES", {"text": TEXT_ENCODER})


def refused(words: str, *arguments, error=ProviderError, **options):
    with pytest.raises(error) as caught:
        build(*arguments, **options)
    message = str(caught.value)
    assert words in message
    assert message.endswith(".") and "\n" not in message


def files(folder: Path) -> list[str]:
    place = folder / "plans"
    return sorted(path.name for path in place.iterdir()) if place.exists() else []


@pytest.mark.slow
def test_embedded_engine(built, trt):
    folder, printed = built
    version = trt.__version__
    directory = EngineDirectory.open(folder)
    weights = directory.manifest.files
    screens = plans.SCREENS[: len(directory.manifest.taps)]
    components = ("text", "unet", *screens)
    assert [(p["component"], p["target"]) for p in printed] == [(c, t) for t in TARGETS for c in components]
    names = [f"{c}-tensorrt-rtx-{t}-{version}.plan" for c in components for t in TARGETS]
    assert files(folder) == sorted([*names, "manifest.json"])
    for target in TARGETS:
        found = plans.find(directory, "tensorrt-rtx", target, version)
        for file, least in ((found.unet, weights["unet.onnx.data"].size), (found.text, weights[TEXT_ENCODER].size)):
            plan = file.plan
            assert printed.count(msgspec.to_builtins(plan)) == 1
            assert least <= plan.size <= 4 * least  # float32, as exported
            assert (plan.gpu, plan.most) == (None, 64)
            assert 0 < plan.seconds < 600
            assert plan.size < plan.peak_memory < 1 << 34
        assert [file.plan.component for file in found.screens] == list(screens)
        sizes = [file.plan.size for file in found.screens]
        assert sizes == sorted(sizes)  # each tap takes more layers than the one before
        assert sizes[-1] < found.unet.plan.size / 2
    # Compiled for another GPU is something else.
    assert len({p["sha256"] for p in printed}) == len(printed)


@pytest.mark.slow
def test_table(built, capsys):
    print_plans(msgspec.convert(built[1], list[plans.Plan]))
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    each = len(built[1]) // 2
    assert [line.split()[1] for line in lines] == ["target", *["SM86"] * each, *["SM120"] * each]
    assert "For SM120, SM86, with TensorRT" in printed.err and "up to 64 rows" in printed.err


@pytest.mark.slow
def test_the_embedded_model_in_fp16_for_all_targets(trt, tmp_path):
    """SM75 among them, which cannot multiply float32."""
    folder = tmp_path / "half"
    assert memedge("export", EMBEDDED_MODEL, "-o", folder, "--precision", "fp16").returncode == 0
    targets = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    assert {"SM75", "SM80", "SM86", "SM89", "SM120"} <= set(targets)
    records = build(folder, "tensorrt-rtx", targets)
    directory = EngineDirectory.open(folder)
    for target in targets:
        found = plans.find(directory, "tensorrt-rtx", target.lower(), trt.__version__)
        assert {found.unet.plan, found.text.plan} <= set(records)
        assert len(found.screens) == len(directory.manifest.taps) > 0


@pytest.mark.usefixtures("text_alone")
def test_failing_target_leaves_the_others(trt, folder):
    """SM75 cannot multiply float32: TensorRT's own reason is told, and what was built before stays."""
    refused("for SM75 (", folder, "tensorrt-rtx", ["SM120", "SM75", "SM86"])
    assert files(folder) == ["manifest.json", f"text-tensorrt-rtx-sm120-{trt.__version__}.plan"]
    manifest = json.loads((folder / "plans" / "manifest.json").read_text())
    assert [plan["target"] for plan in manifest["plans"]] == ["sm120"]


@pytest.mark.filterwarnings("ignore:.*timing:DeprecationWarning")
def test_configuration(trt, folder, monkeypatch):
    """What is asked of TensorRT: one target, no TF32, rows and prompts from 1 to N, the workspace."""
    configs, profiles = [], []
    for name, made in (("create_builder_config", configs), ("create_optimization_profile", profiles)):
        original = getattr(trt.Builder, name)
        monkeypatch.setattr(trt.Builder, name, lambda self, o=original, made=made: made.append(o(self)) or made[-1])
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda *_: memoryview(b"plan"))
    build(folder, "tensorrt-rtx", ["SM89"], max_batch=5, workspace=0.5)
    for config in configs:
        assert not config.get_flag(trt.BuilderFlag.TF32)
        assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 29
        assert config.num_compute_capabilities == 1
        assert config.get_compute_capability(0) == trt.ComputeCapability.SM89
        assert config.get_timing_cache() is None
    text, unet, *screens = profiles
    assert [list(s) for s in text.get_shape("ids")] == [[1, 24], [1, 24], [5, 24]]
    assert [list(s) for s in unet.get_shape("states")] == [[1, 24, 96], [2, 24, 96], [5, 24, 96]]
    for name in ("row", "prompt"):
        assert [list(s) for s in unet.get_shape(name)] == [[1], [2], [5]]
    taps = EngineDirectory.open(folder).manifest.taps
    for profile, tap in zip(screens, taps, strict=True):  # the embedded engine has one draw
        assert [list(s) for s in profile.get_shape("states")] == [[1, 24, 96], [1, 24, 96], [5, 24, 96]]
        assert [list(s) for s in profile.get_shape("row")] == [[1], [1], [5]]
        assert [list(s) for s in profile.get_shape("reference")] == [[1, *tap.shape]] * 3


@pytest.mark.usefixtures("trt", "text_alone")
def test_progress(folder):
    told = []
    build(folder, "tensorrt-rtx", ["SM89", "SM120"], progress=lambda *step: told.append(step))
    done = [step[0] for step in told]
    assert {step[1] for step in told} == {200}
    assert done == sorted(done)
    assert done[-1] == 200 and 100 in done and len(set(done)) > 20


@pytest.mark.usefixtures("text_alone")
@pytest.mark.filterwarnings("ignore:.*timing:DeprecationWarning")  # in TensorRT-RTX alone
def test_as_tensorrt(trt, folder, monkeypatch):
    """The way of `--provider tensorrt`: plans for this machine's GPU model, and a timing cache that is used again."""
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    here = ("sm89", "NVIDIA L4")
    given = []
    original = trt.IBuilderConfig.create_timing_cache
    monkeypatch.setattr(
        trt.IBuilderConfig,
        "create_timing_cache",
        lambda self, content: given.append(content) or original(self, content),
    )
    for gpus in (None, ["SM89"]):
        (plan,) = build(folder, "tensorrt", gpus, local=lambda: here)
        assert (plan.gpu, plan.target, plan.backend) == ("NVIDIA L4", "sm89", "tensorrt")
    cache = f"timing-tensorrt-sm89-{trt.__version__}.cache"
    assert files(folder) == ["manifest.json", plan.name, cache]
    assert given[0] == b"" and given[1] == (folder / "plans" / cache).read_bytes() != b""
    # One of a machine that TensorRT does not know is replaced.
    plans.record_cache(folder / "plans", EngineDirectory.open(folder), cache, memoryview(b"of no TensorRT at all"))
    build(folder, "tensorrt", local=lambda: here)
    assert given[2:] in ([b"of no TensorRT at all"], [b"of no TensorRT at all", b""])


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from memedge.export import tensorrt

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells' background jobs ignore it
tensorrt.FILES = {"text": tensorrt.TEXT_ENCODER}
told = []

def interrupt(done, total):
    if not told:
        os.kill(os.getpid(), signal.SIGINT)
    told.append(done)

try:
    tensorrt.build(Path(sys.argv[1]), "tensorrt-rtx", ["SM89"], progress=interrupt)
except KeyboardInterrupt:
    print(max(told))
"""


@pytest.mark.usefixtures("trt")
def test_interrupted(folder):
    """Control-C ends a build between two steps and leaves nothing.

    In a process of its own: once OpenVINO has used AMX in this one, a signal's frame is larger than the stack that
    pytest's faulthandler has for signals, and Linux ends the process.
    """
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, folder], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 50
    assert files(folder) == []


@pytest.mark.usefixtures("trt", "text_alone")
def test_broken_progress(folder):
    def fail(*_):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        build(folder, "tensorrt-rtx", ["SM89"], progress=fail)
    assert files(folder) == []


@pytest.mark.usefixtures("trt")
def test_unknown_operator(folder):
    path = folder / TEXT_ENCODER
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type = "CumSum"  # with one input of its two
    onnx.save(model, path)
    list_file(folder, TEXT_ENCODER)
    refused(f"cannot read {path} (CumSum {node.name}: ", folder, "tensorrt-rtx", ["SM89"])
    assert files(folder) == []


@pytest.mark.parametrize(("gpus", "words"), [(["SM86", "SM77"], "SM77"), (["CURRENT"], "CURRENT"), ([""], "nothing")])
@pytest.mark.usefixtures("trt")
def test_unknown_target(folder, gpus, words):
    refused(f"cannot build for {words}", folder, "tensorrt-rtx", gpus)
    assert files(folder) == []


def test_no_gpu(trt, folder, monkeypatch):
    refused("There is no GPU here: name targets with --gpu, of SM75", folder, "tensorrt-rtx", local=lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    refused("there is none here", folder, "tensorrt", local=lambda: None)
    refused("there is none here", folder, "tensorrt", ["SM89"], local=lambda: None)


@pytest.mark.usefixtures("trt", "text_alone")
def test_gpu_of_this_machine(folder):
    (plan,) = build(folder, "tensorrt-rtx", local=lambda: ("sm120", "NVIDIA RTX PRO 6000"))
    assert (plan.target, plan.gpu) == ("sm120", None)
    refused("cannot build for SM90", folder, "tensorrt-rtx", local=lambda: ("sm90", "NVIDIA H100"))


def test_tensorrt_for_another_gpu(trt, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    here = ("sm89", "NVIDIA L4")
    words = "alone, which is SM89 (NVIDIA L4): leave --gpu out"
    refused(words, folder, "tensorrt", ["SM120"], local=lambda: here)
    refused(words, folder, "tensorrt", ["SM89", "SM120"], local=lambda: here)


@pytest.mark.parametrize(("backend", "module"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")])
def test_not_installed(monkeypatch, folder, backend, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"python -m pip install 'memedge[{backend}]'", folder, backend, ["SM89"])


@pytest.mark.usefixtures("trt")
def test_int8(folder):
    edit_manifest(folder, lambda m: m.update(precision="int8"))
    refused("is an int8 engine", folder, "tensorrt-rtx", ["SM89"])


@pytest.mark.parametrize("options", [{"max_batch": 0}, {"max_batch": 1 << 17}, {"workspace": 0}, {"workspace": -1.0}])
def test_out_of_range(folder, options):
    refused("cannot be had", folder, "tensorrt-rtx", ["SM89"], error=InputError, **options)


@pytest.mark.usefixtures("trt")
def test_command_line_errors(folder, tmp_path):
    for arguments, words in (
        (["--gpu", "SM999"], "cannot build for SM999: use SM75"),
        (["--gpu", "SM89", "--workspace", "-1"], "workspace of -1.0 GiB"),
    ):
        fails(memedge("build", folder, "--provider", "tensorrt-rtx", *arguments), words)
    absent = memedge("build", tmp_path / "absent", "--provider", "tensorrt-rtx", "--gpu", "SM89")
    fails(absent, "is not a directory")


def test_loads_neither_torch_nor_onnx_runtimes():
    """`memedge[tensorrt]` alone must be able to build."""
    code = "import sys, memedge.export.tensorrt; print({'torch', 'diffusers', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
