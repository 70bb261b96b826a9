"""The screen's graphs: what they compute is the UNet's own value at the tap, in every precision that exports."""

from itertools import pairwise

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from memedge.embedded import EMBEDDED_ENGINE
from memedge.engine.directory import SCREENS, UNET, EngineDirectory
from memedge.engine.engine import Engine
from memedge.engine.manifest import MOST_TAPS
from memedge.engine.operators import OPERATORS
from memedge.export.export import export
from memedge.export.graphs import cost, screen

PROMPTS = ["the left luggage sign", "a red bicycle", ""]


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def exported(request, checkpoint, engine, tmp_path_factory):
    if request.param == "fp32":
        return engine
    output = tmp_path_factory.mktemp("screen") / request.param
    export(checkpoint, output, precision=request.param, draws=2, accept_parity=True)
    return output


def at_tap(folder, value, states, row):
    """The UNet's own value, float64, of one prompt on one row: its graph with one more output."""
    model = ir.load(folder / UNET)
    model.graph.outputs.append(next(v for node in model.graph for v in node.outputs if v.name == value))
    path = folder.parent / f"{folder.name}-watched.onnx"
    ir.external_data.load_to_model(model)
    ir.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"states": states[None], "prompt": np.zeros(1, np.int64), "row": np.array([row])}
    cached = EngineDirectory.open(folder).baseline.cached
    return session.run([value], feeds | cached)[0][0].astype(np.float64)


def test_changes_are_the_unets_own(exported):
    engine = Engine.open(exported, "cpu", None, 1)
    manifest = engine.directory.manifest
    assert 1 <= len(manifest.taps) <= MOST_TAPS
    states = engine.encode(engine.tokenize(PROMPTS)[0])
    arrays = engine.backend.memory.download(states.tensor)
    tolerance = {"fp32": 1e-4, "fp16": 3e-2, "int8": 1e-4}[manifest.precision]
    for number, tap in enumerate(manifest.taps, start=1):
        found = engine.changes(states, number)
        assert found.shape == (3, tap.channels)
        pixels = 0 if len(tap.shape) == 2 else (1, 2)
        expected = np.zeros_like(found)
        for draw in range(engine.draws):
            values = [at_tap(exported, tap.value, state, draw) for state in arrays]
            assert values[0].shape == tap.shape
            for place, value in enumerate(values):
                expected[place] += np.sqrt(((value - values[-1]) ** 2).sum(axis=pixels)) / engine.draws
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * expected.max())
        assert expected[:2].max() > 0


def test_batches_change_nothing(exported):
    engine = Engine.open(exported, "cpu", None, 1)
    whole = engine.changes(engine.encode(engine.tokenize(PROMPTS * 3)[0]), 1)
    alone = np.concatenate([engine.changes(engine.encode(engine.tokenize([p])[0]), 1) for p in PROMPTS * 3])
    np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-6)


def test_taps_are_cheap_and_in_order(exported):
    manifest = EngineDirectory.open(exported).manifest
    flops = [tap.flops for tap in manifest.taps]
    assert all(later >= screen.STEP * earlier for earlier, later in pairwise(flops))
    assert 0 < flops[-1] <= screen.DEAREST * manifest.flops.remaining
    assert {name for name in manifest.files if name.startswith("screen")} == set(SCREENS[: len(flops)])
    assert all((exported / name).stat().st_size < 100_000 for name in SCREENS[: len(flops)])  # weights are the UNet's


def test_the_first_tap_stands_behind_the_first_cross_attention():
    """Nothing of the embedded UNet but keys, values, one attention and its output layer is before it."""
    manifest = EngineDirectory.open(EMBEDDED_ENGINE).manifest
    first = ir.load(EMBEDDED_ENGINE / SCREENS[0]).graph
    tokens, width = manifest.tokens, manifest.state_width
    pixels, channels = manifest.taps[0].shape
    attention = 4 * pixels * tokens * channels
    assert manifest.taps[0].flops == 2 * 2 * tokens * width * channels + attention + 2 * pixels * channels * channels
    assert sum(node.op_type == "MultiHeadAttention" for node in first) == 1
    assert cost.flops(next(node for node in first if node.op_type == "MultiHeadAttention")) == attention


def test_every_graph_is_known():
    assert set(SCREENS) <= set(OPERATORS)
