"""The gradient graphs: in agreement with torch's autograd, light, and not there where they cannot be."""

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from engines import edit_manifest
from torch_denoiser import EMOJI

from memedge.autograd.gradients import TorchGradients
from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import GRADIENT, NOISE_GRADIENT, UNET
from memedge.engine.engine import Engine
from memedge.engine.errors import ProviderError
from memedge.engine.gradients import OnnxGradients
from memedge.export.export import export
from memedge.export.graphs import gradient_graphs

PROMPTS = ["the left luggage sign", "a red bicycle", "zebra on skis!"]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference of a row, relative to the row's largest value."""
    axes = tuple(range(1, expected.ndim))
    return float((np.abs(found - expected).max(axis=axes) / np.abs(expected).max(axis=axes)).max())


@pytest.fixture(scope="module")
def embedded() -> Engine:
    return Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)


def agree(engine: Engine, checkpoint: str, tolerance: float) -> None:
    onnx, autograd = OnnxGradients(engine), TorchGradients(engine, checkpoint)
    states = engine.backend.memory.download(engine.encode(engine.tokenize(PROMPTS)[0]).tensor)
    for weights in [(1.0, 0.0), (0.7, -6.0), (0.0, 1.0)]:
        found, expected = (source.statistics(states, *weights).states for source in (onnx, autograd))
        assert difference(found, expected) < tolerance
    generator = np.random.default_rng(0)
    latents, cotangent = generator.standard_normal((2, 5, *engine.directory.manifest.latent_shape), dtype=np.float32)
    found, expected = (source.noise(states[0], latents, cotangent) for source in (onnx, autograd))
    assert difference(found, expected) < tolerance


def test_agreement_with_autograd(embedded):
    agree(embedded, str(EMOJI), 2e-4)


@pytest.mark.slow
def test_agreement_in_fp16(tmp_path):
    """Of a trained model, rounded to fp16: its gradients point where the float32 ones do."""
    export(EMOJI, tmp_path / "engine", precision="fp16")
    agree(Engine.open(tmp_path / "engine", "cpu", None, 1), str(EMOJI), 0.1)


def test_batches_change_nothing(embedded):
    states = embedded.backend.memory.download(embedded.encode(embedded.tokenize(PROMPTS)[0]).tensor)
    single = Engine.open(EMBEDDED_ENGINE, "cpu", None, 1)
    single.rows_per_call = 1
    sources = [OnnxGradients(engine) for engine in (single, embedded)]
    one, many = (source.statistics(states, 0.7, -6.0) for source in sources)
    np.testing.assert_allclose(one.norm, many.norm, rtol=1e-5)
    assert difference(one.states, many.states) < 1e-4
    latents, cotangent = np.random.default_rng(0).standard_normal((2, 3, 4, 16, 16), dtype=np.float32)
    alone, together = (source.noise(states[0], latents, cotangent) for source in sources)
    assert difference(alone, together) < 1e-4


def test_weights_stay_where_they_are():
    """The graph of the states reads the UNet's own file; each of both is small beside it."""
    model = ir.load(EMBEDDED_ENGINE / GRADIENT)
    outside = {v.const_value.location for v in model.graph.initializers.values() if hasattr(v.const_value, "location")}
    assert outside == {f"{UNET}.data"}
    sizes = [(EMBEDDED_ENGINE / name).stat().st_size for name in (GRADIENT, NOISE_GRADIENT)]
    assert sum(sizes) < 0.15 * (EMBEDDED_ENGINE / f"{UNET}.data").stat().st_size


def test_the_embedded_engines_graphs_are_reproduced(tmp_path):
    for path in EMBEDDED_ENGINE.iterdir():
        if path.is_file() and "gradient" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    assert gradient_graphs.write(tmp_path) is None
    for name in (GRADIENT, NOISE_GRADIENT):
        assert (tmp_path / name).read_bytes() == (EMBEDDED_ENGINE / name).read_bytes()


def test_an_operator_without_a_rule(copy):
    """Nothing is written, and what is missing is named."""
    for name in (GRADIENT, NOISE_GRADIENT):
        (copy / name).unlink()
    model = ir.load(copy / UNET)
    next(node for node in model.graph if node.op_type == "Sigmoid").op_type = "HardSigmoid"
    ir.save(model, copy / UNET)
    assert "no rule for ai.onnx::HardSigmoid" in (gradient_graphs.write(copy) or "")
    assert not list(copy.glob("*gradient*"))


def test_engines_and_providers_without_gradients(copy):
    def forget(manifest):
        for name in (GRADIENT, NOISE_GRADIENT):
            del manifest["files"][name]

    edit_manifest(copy, forget)
    with pytest.raises(ProviderError, match=r"has no gradient\.onnx, which gradients need: export the model again"):
        OnnxGradients(Engine.open(copy, "cpu", None, 1))
    with pytest.raises(ProviderError, match="Provider 'openvino' computes no gradients: use provider 'cpu' or 'cuda'"):
        OnnxGradients(Engine.open(EMBEDDED_ENGINE, "openvino", "fp32", 1))
    with pytest.raises(ProviderError, match="Provider 'openvino' computes no gradients"):
        Engine.open(EMBEDDED_ENGINE, "openvino", "fp32", 1, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [GRADIENT, NOISE_GRADIENT])
def test_tensorrt_builds_them(name):
    """TensorRT-RTX reads every operator and compiles the graph for a GPU that is not here; nothing runs it yet."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(EMBEDDED_ENGINE / name)), parser.get_error(0).desc()
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    for tensor in (network.get_input(i) for i in range(network.num_inputs)):
        least, most = ([count if size == -1 else size for size in tensor.shape] for count in (1, 2))
        if least != most:
            profile.set_shape(tensor.name, least, most, most)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None


def test_no_torch_is_needed():
    code = """
import sys
from memedge import Mitigator
found = Mitigator.load(provider="cpu", threads=1).embedding("the left luggage sign")
assert found.succeeded and found.iterations > 0, found
assert not {"torch", "onnx", "transformers", "diffusers"} & set(sys.modules), sorted(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
