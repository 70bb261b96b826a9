"""The text encoder's graph: what torch gives, in operators that every runtime can fuse."""

import gc
import weakref

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import CLIPTextModel

from memedge.export.graphs.prefix_split import split
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.open import load_checkpoint


@pytest.mark.parametrize("prompts", [1, 2, 5])
def test_text_encoder_is_torchs(engine, checkpoint, prompts):
    """Any number of prompts, of random tokens; torch's own attention as transformers chooses it."""
    path = engine / "text_encoder.onnx"
    ids = np.random.default_rng(prompts).integers(0, 514, (prompts, 16))
    text_encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = text_encoder(torch.from_numpy(ids)).last_hidden_state.numpy()
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(["states"], {"ids": ids})[0]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_text_encoder_is_causal(engine):
    """What follows a token does not change its state."""
    session = onnxruntime.InferenceSession(engine / "text_encoder.onnx", providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(0, 514, (2, 16))
    ids[1, :9] = ids[0, :9]
    first, second = session.run(["states"], {"ids": ids})[0]
    np.testing.assert_allclose(first[:9], second[:9], atol=1e-6)
    assert (np.abs(first[9:] - second[9:]).max(axis=1) > 1e-3).all()


def test_graphs_have_no_dynamic_shapes_inside(engine):
    for name in ("text_encoder.onnx", "unet.onnx"):
        operators = {node.op_type for node in ir.load(engine / name).graph}
        assert not operators & {"Shape", "Where", "IsNaN", "Expand", "Cast", "If", "Loop"}, name


def test_weights_are_let_go(checkpoint):
    """Once its graphs are dropped, a checkpoint's weights are: they are as large as the sessions that come next."""
    with quiet():
        loaded = load_checkpoint(str(checkpoint))
        modules = loaded._denoiser, loaded._text_encoders
        weights = {name: weakref.ref(p) for module in modules for name, p in module.named_parameters()}
        parts = split(loaded.unet_graph(), 2), loaded.text_encoder_graph()
    assert all(weight() is not None for weight in weights.values())
    del loaded, modules, parts
    gc.collect()
    assert not [name for name, weight in weights.items() if weight() is not None]
