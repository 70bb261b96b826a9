"""Stable Diffusion 3.5's transformer and its three text encoders, against diffusers' own pipeline."""

from pathlib import Path

import numpy as np
import pytest
import sd3
import torch
import velocities
from loading import edit_json, load, refused
from safetensors.torch import save_file

from memedge import Detector, export_engine
from memedge.engine.embeddings import unpack
from memedge.engine.engine import Engine
from memedge.engine.errors import ExportError, InputError
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.call import Call
from memedge.export.sources.torch_checkpoint import TorchCheckpoint

PROMPTS = ["a star on a ski", "zebra \ufb01lm!\te\u0301", "a very long prompt " * 30]
SLOW = pytest.mark.slow  # tracing takes most of a minute
SIZE, TOKENS = (96, 128), 20
CALL = {"height": SIZE[0], "width": SIZE[1], "max_sequence_length": TOKENS}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return sd3.build(tmp_path_factory.mktemp("sd3") / "checkpoint")


@pytest.fixture(scope="module")
def engine(checkpoint) -> Path:
    export_engine(checkpoint, checkpoint.parent / "engine", size=SIZE, max_sequence_length=TOKENS)
    return checkpoint.parent / "engine"


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return velocities.load(checkpoint)


@SLOW
def test_engine_agrees_with_the_pipeline(engine, pipeline):
    """The batch of a call is [unconditional, conditional]."""
    detector = Detector.load(engine, "cpu")
    noise = Engine.open(engine, "cpu", None, None).directory.baseline.sample
    scores = detector.score(PROMPTS, operands="uncond_delta", alignment="channel")
    for prompt, norm, alignment in zip(PROMPTS, scores.norm, scores.alignment, strict=True):
        calls = [
            velocities.predictions(pipeline, sigma, torch.from_numpy(noise), prompt=prompt, **CALL)
            for sigma in velocities.SIGMAS
        ]
        expected = velocities.statistics(noise, [(both[1:], both[:1]) for (both,) in calls])
        assert expected[0] > 0.1  # or it would be a comparison of rounding
        np.testing.assert_allclose(norm, expected[0], rtol=1e-4)
        np.testing.assert_allclose(alignment, expected[1], atol=1e-4)


@SLOW
def test_embeddings_are_the_pipelines(engine, pipeline):
    opened = Engine.open(engine, "cpu", None, None)
    ids, cut = opened.tokenize(PROMPTS)
    assert cut.tolist() == [False, False, True]
    states, pooled = unpack(opened.directory.manifest, opened.backend.memory.download(opened.encode(ids).tensor))
    with quiet(), torch.no_grad():
        own, _, own_pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=TOKENS)
    np.testing.assert_allclose(states, own, atol=2e-5)
    np.testing.assert_allclose(pooled, own_pooled, atol=2e-5)
    detector = Detector.load(engine, "cpu")
    by_states, by_prompts = detector.score_embeddings(own, own_pooled), detector.score(PROMPTS)
    np.testing.assert_allclose(by_states.norm, by_prompts.norm, rtol=1e-4)
    np.testing.assert_allclose(by_states.alignment, by_prompts.alignment, atol=1e-4)


def test_without_t5(tmp_path):
    """Zeros stand in its place, as many as max_sequence_length; the transformer is like 3.0's, without norms."""
    folder = sd3.build(tmp_path / "checkpoint", t5=False, medium=False)
    pipeline = velocities.load(folder, text_encoder_3=None, tokenizer_3=None)
    own = TorchCheckpoint(load(folder, call=Call(SIZE, TOKENS)))
    noise = np.random.default_rng(0).standard_normal(own.latent_shape, dtype=np.float32)
    with quiet(), torch.no_grad():
        states, _, pooled, _ = pipeline.encode_prompt(PROMPTS[0], None, None, max_sequence_length=TOKENS)
    ids = np.concatenate([tokenizer.encode(PROMPTS[0]).ids for tokenizer in own.tokenizers])[None]
    found = own.encode(ids)[0]
    assert own.tokens == len(states[0]) == 77 + TOKENS
    np.testing.assert_allclose(found[:-1], states[0], atol=1e-6)
    np.testing.assert_allclose(found[-1, : own.pooled_width], pooled[0], atol=1e-6)
    both = velocities.predictions(pipeline, 1.0, torch.from_numpy(noise[None]), prompt=PROMPTS[0], **CALL)[0]
    np.testing.assert_allclose(own.predict(noise, 1000, found), both[1], atol=1e-5)
    assert TorchCheckpoint(load(folder)).tokens == 77 + 256


def test_lora(checkpoint, tmp_path):
    """Fused into the transformer and both of CLIP's text encoders, as diffusers fuses it."""
    pipeline, before = velocities.load(checkpoint), load(checkpoint).modules
    layers = {
        "transformer": ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn2.to_v", "proj_out"],
        "text_encoder": ["text_model.encoder.layers.0.self_attn.q_proj"],
        "text_encoder_2": ["text_model.encoder.layers.1.self_attn.v_proj"],
    }
    state = {}
    for part, names in layers.items():
        for name in names:
            layer = getattr(pipeline, part).get_submodule(name)
            state[f"{part}.{name}.lora_A.weight"] = torch.randn(3, layer.in_features)
            state[f"{part}.{name}.lora_B.weight"] = torch.randn(layer.out_features, 3)
    save_file(state, file := tmp_path / "style.safetensors")
    with quiet():
        pipeline.load_lora_weights(str(file))
        pipeline.fuse_lora(components=list(layers), lora_scale=0.5)
        pipeline.unload_lora_weights()
    fused = load(checkpoint, loras=[f"{file}:0.5"])
    assert fused.id == "checkpoint + style.safetensors:0.5"
    for part, module in fused.modules.items():
        own, was = getattr(pipeline, part).state_dict(), before[part].state_dict()
        changed = [name for name, value in module.state_dict().items() if not torch.equal(value, was[name])]
        assert len(changed) == len(layers.get(part, []))
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, own[name], rtol=0, atol=1e-6)
    save_file({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": torch.ones(3, 64)}, file)
    refused(checkpoint, "style.safetensors has kohya's names", loras=[str(file)])
    save_file(state | {"text_encoder_3.encoder.block.0.lora_A.weight": torch.ones(3, 96)}, file)
    refused(checkpoint, "it is a LoRA for another architecture", loras=[str(file)])


def test_sizes(checkpoint):
    for size, words in {
        (8 * 50, 128): "has no positions for 128x400: give a --size of at most 384 pixels a side, in steps of 16",
        (8, 128): "has no positions for 128x8",
    }.items():
        with pytest.raises(ExportError, match=words):
            TorchCheckpoint(load(checkpoint, call=Call(size)))
    refused(checkpoint, "--size is 128x100: give multiples of 8 pixels", call=Call((100, 128)))


def test_other_pipelines_are_refused(tmp_path):
    """By the names of their classes, before anything is read."""
    folder = sd3.build(tmp_path / "checkpoint", t5=False)
    for kind in ("StableDiffusion3ControlNetPipeline", "StableDiffusion3InpaintPipeline"):
        edit_json(folder / "model_index.json", _class_name=kind)
        refused(folder, f"is a {kind}, as its model_index.json says: memedge exports Stable Diffusion 1.x, 2.x, SDXL,")


def test_another_scheduler_is_refused(tmp_path):
    folder = sd3.build(tmp_path / "checkpoint", t5=False)
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="FlowMatchHeunDiscreteScheduler")
    refused(
        folder,
        "is of FlowMatchHeunDiscreteScheduler: memedge knows transformers that were trained for "
        "FlowMatchEulerDiscreteScheduler.",
    )


def test_without_its_text_encoder(checkpoint, engine, pipeline, tmp_path):
    """The same scores of the pipeline's embeddings, in a smaller engine that reads no prompts."""
    export_engine(checkpoint, tmp_path / "bare", size=SIZE, max_sequence_length=TOKENS, text_encoder=False)
    bare, whole = Detector.load(tmp_path / "bare", "cpu"), Detector.load(engine, "cpu")
    with torch.no_grad():
        states, empty, pooled, empty_pooled = pipeline.encode_prompt(*["a star"] * 3, max_sequence_length=TOKENS)
    rows, vectors = torch.cat([states, empty]).numpy(), torch.cat([pooled, empty_pooled]).numpy()
    found, expected = (one.score_embeddings(rows, vectors) for one in (bare, whole))
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-5)  # ε_0 is of torch's states of the empty prompt
    np.testing.assert_allclose(found.alignment, expected.alignment, atol=1e-5)
    assert found.norm[1] == 0  # the empty prompt
    graphs = [(folder / "text_encoder.onnx").stat().st_size for folder in (tmp_path / "bare", engine)]
    assert graphs[0] < graphs[1] / 10
    with pytest.raises(InputError, match=r"exported without its text encoder, and reads no prompts: give score_emb"):
        bare.detect(["a star"])
