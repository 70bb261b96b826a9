"""The text encoder's graph: what torch gives, in operators that every runtime can fuse."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import CLIPTextModel


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
