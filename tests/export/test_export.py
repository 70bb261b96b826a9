"""What export refuses, and that it never leaves half an engine."""

import json
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import onnx
import pytest
from command_line import memedge
from models import make_checkpoint

import memedge.export.parity as parity
from memedge import Detector
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import SCREENS, describe_file
from memedge.engine.errors import ExportError, InputError
from memedge.export.export import check_graphs, export


def refused(model, output, words, kind=ExportError, **options):
    before = set(output.parent.iterdir())
    with pytest.raises(kind, match=re.escape(words)) as caught:
        export(model, output, **options)
    assert "\n" not in str(caught.value)
    assert set(output.parent.iterdir()) == before


def test_what_is_written(engine, checkpoint):
    """The files docs/engine.md names, all of them described in the manifest; nothing that names this machine."""
    manifest = json.loads((engine / "manifest.json").read_text())
    names = {
        "tokenizer.json",
        "text_encoder.onnx",
        "unet.onnx",
        "unet.onnx.data",
        "baseline.safetensors",
        "prefix.onnx",
        "gradient.onnx",
        "noise_gradient.onnx",
        *SCREENS,
    }
    assert {p.name for p in engine.iterdir()} == names | {"manifest.json"}
    assert manifest["files"].keys() == names
    for name, entry in manifest["files"].items():
        assert describe_file(engine / name).sha256 == entry["sha256"]
    assert (manifest["timesteps"], manifest["calibrations"]) == ([981, 41], {})
    assert manifest["alphas_cumprod"] == pytest.approx([0.0057755, 0.960873], rel=1e-4)  # docs/methods.md §0
    for path in engine.iterdir():
        content = path.read_bytes()
        assert b"site-packages" not in content
        assert str(checkpoint.parent).encode() not in content
    assert oct(engine.stat().st_mode & 0o777) == "0o755"


def test_a_graph_that_nobody_could_load(tmp_path):
    """Of an operator that is not in engine/operators.py, the export says so, not whoever loads the engine."""
    check_graphs(EMBEDDED_ENGINE)
    model = onnx.load(EMBEDDED_ENGINE / "text_encoder.onnx")
    model.graph.node[0].op_type = "LSTM"
    onnx.save(model, tmp_path / "text_encoder.onnx")
    words = "The model's text_encoder.onnx holds the operator 'LSTM', which it never does in an engine: nothing was"
    with pytest.raises(ExportError, match=words):
        check_graphs(tmp_path)


def test_batch_is_dynamic(engine):
    model = onnx.load(engine / "unet.onnx", load_external_data=False)
    inputs = {i.name: i.type.tensor_type.shape.dim for i in model.graph.input}
    cached = {name for name in inputs if name.startswith("cached.")}
    assert cached and inputs.keys() - cached == {"states", "prompt", "row"}
    assert inputs["states"][0].dim_param == "prompts"
    assert inputs["prompt"][0].dim_param == inputs["row"][0].dim_param == "rows"
    assert {inputs[name][0].dim_value for name in cached} == {2}  # (timestep, draw)


def test_bad_input(checkpoint, tmp_path):
    output = tmp_path / "engine"
    refused(tmp_path / "absent", output, "There is no ")
    refused(tmp_path, output, "holds no unet folder")
    refused(checkpoint, output, "draws is 0", draws=0)
    refused(checkpoint, output, "seed is -1", seed=-1)
    refused(checkpoint, output, "Precision 'bf16'", precision="bf16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(checkpoint, tmp_path / "full", "is there already", InputError)


def test_output_folder_absent(checkpoint, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        export(checkpoint, tmp_path / "absent" / "engine")
    assert not list(tmp_path.iterdir())


def test_broken_checkpoint(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(model, tmp_path / "engine", "cannot be loaded")


def test_tokenizer_without_a_length(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = model / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["model_max_length"]
    config.write_text(json.dumps(settings))
    refused(model, tmp_path / "engine", "names no length or no padding token")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_not_finite(tmp_path, value):
    model = make_checkpoint(tmp_path / "model", poison=value)
    refused(model, tmp_path / "engine", "NaN or infinity in 'mid_block")


def test_sample_prediction(checkpoint, tmp_path):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = model / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"sample"'))
    refused(model, tmp_path / "engine", 'has prediction_type "sample", so its UNet predicts neither')


def test_parity_out_of_tolerance(checkpoint, tmp_path, monkeypatch):
    """An engine that differs from torch is not written, whatever the cause."""
    real = parity.engine_epsilon
    monkeypatch.setattr("memedge.export.export.engine_epsilon", lambda *arguments: real(*arguments) * 1.001)
    refused(checkpoint, tmp_path / "engine", "differs from the original by 1.0e-03")


def test_parity_is_accepted(checkpoint, tmp_path, monkeypatch):
    """The way on that the refusal names: the engine, and a sentence that every `info` shows."""
    real = parity.engine_epsilon
    monkeypatch.setattr("memedge.export.export.engine_epsilon", lambda *arguments: real(*arguments) * 1.001)
    refused(
        checkpoint, tmp_path / "engine", "nothing was written; accept that with --accept-parity (accept_parity=True"
    )
    manifest = export(checkpoint, tmp_path / "engine", accept_parity=True)
    assert manifest.parity.norm_relative == pytest.approx(1e-3, rel=0.01)
    (note,) = manifest.notes
    assert note.startswith("It is less exact than fp32 promises, and was exported with --accept-parity: it differs")
    assert note in " ".join(memedge("info", tmp_path / "engine").stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_stopped_in_the_middle(checkpoint, tmp_path, how):
    command = [sys.executable, "-m", "memedge", "export", checkpoint, "-o", tmp_path / "engine"]
    heard = partial(signal.signal, how, signal.SIG_DFL)  # a test run in the background may have inherited its deafness
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while "reference" not in (line := process.stderr.readline()):
        assert line, "it ended before it was stopped"
    assert list(tmp_path.iterdir())  # half an engine
    process.send_signal(how)
    process.communicate()
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_existing_empty_folder_is_used(checkpoint, tmp_path):
    (tmp_path / "engine").mkdir()
    export(checkpoint, tmp_path / "engine")
    assert Detector.load(tmp_path / "engine").score(["a"]).norm[0] > 0
