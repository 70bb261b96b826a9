"""Single files in the original layouts give the modules of the diffusers folder that they were written from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_process import export, fails, manifest
from hub_server import Hub, serving
from loading import assert_same, edit_json, load, refused
from original_layout import original, write_original
from pipelines import index, make
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """An SD 1.x folder."""
    return make(tmp_path_factory.mktemp("single") / "model", "sd1")


@pytest.fixture(scope="module")
def file(model) -> Path:
    """Its single file."""
    return write_original(model, "sd1", model.parent / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_same_modules(kind, dtype, tmp_path):
    """Of each architecture, in each dtype, with the text encoders' layers that are used and what is predicted."""
    prediction = "v_prediction" if kind == "sd2" else "epsilon"
    model = make(tmp_path / "model", kind, prediction, dtype=dtype)
    file = write_original(model, kind, tmp_path / "file.safetensors")
    parts = load(file, config=str(model))
    assert parts.id == "file.safetensors"
    assert_same(load(model), parts)
    assert parts.scheduler["prediction_type"] == prediction
    if kind == "sd2":
        assert len(parts.text_encoders[0].encoder.layers) == 23


def test_hash(file, model, tmp_path):
    """Of the file and of what its configuration is made of, but not of the config's weights."""
    before = load(file, config=str(model))
    config = shutil.copytree(model, tmp_path / "config")
    shutil.rmtree(config / "unet")
    (config / "unet").mkdir()
    shutil.copy(model / "unet" / "config.json", config / "unet")
    (config / "text_encoder" / "model.safetensors").unlink()
    after = load(file, config=str(config))
    assert_same(before, after)
    assert after.sha256 == before.sha256
    edit_json(config / "scheduler" / "scheduler_config.json", beta_end=0.013)
    assert load(file, config=str(config)).sha256 != before.sha256


def test_pickle(file, model, tmp_path):
    """Read if allowed, with lightning's outer dictionary or without it."""
    for name, content in (
        ("a.ckpt", {"state_dict": original(model, "sd1"), "epoch": 3}),
        ("b.pt", original(model, "sd1")),
    ):
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, f"{name} is a pickle and can run code of its author", config=str(model))
        assert_same(load(file, config=str(model)), load(tmp_path / name, config=str(model), allow_pickle=True))


def test_not_a_checkpoint(file, model, tmp_path):
    """What else is published as one file, and files of which parts are missing."""
    state = original(model, "sd1")
    other = tmp_path / "other.safetensors"

    def refuse(tensors: dict[str, torch.Tensor], words: str) -> None:
        save_file(tensors, other)
        refused(other, words, config=str(model))

    unet = {name: tensor for name, tensor in state.items() if name.startswith("model.diffusion_model.")}
    text = {name: tensor for name, tensor in state.items() if name.startswith("cond_stage_model.")}
    refuse(text, "holds no UNet in the original layout")
    refuse(unet, "holds no text encoder of SD 1, SD 2 or SDXL")
    refuse(unet | {"conditioner.embedders.0.model.text_projection": torch.ones(1)}, "is SDXL's refiner")
    old = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in state.items()}
    refuse(old, "holds no text encoder of SD 1, SD 2 or SDXL")  # and does not take the config's
    less = {name: tensor for name, tensor in state.items() if not name.endswith("layers.1.mlp.fc2.bias")}
    refuse(less, "lacks encoder.layers.1.mlp.fc2.bias of the text_encoder")
    less = {name: tensor for name, tensor in state.items() if "out.2" not in name}
    refuse(less, "holds 206 tensors of a UNet and its config describes 208")
    block = "model.diffusion_model.output_blocks.4.0.in_layers.0.weight"
    refuse(state | {block: torch.ones(8)}, "holds 209 tensors of a UNet and its config describes 208")
    inpainting = torch.zeros(16, 9, 3, 3)
    refuse(state | {"model.diffusion_model.input_blocks.0.0.weight": inpainting}, "cannot be loaded (")
    other.write_bytes(file.read_bytes()[:5000])
    refused(other, "cannot be loaded (", config=str(model))


def test_config(file, model, tmp_path):
    """It must be one, and of the same architecture; where files don't tell what they predict, it must."""
    refused(file, "There is no config", config=str(tmp_path / "absent"))
    refused(file, "holds no unet folder", config=str(tmp_path))
    sdxl = make(tmp_path / "sdxl", "sdxl")
    refused(file, "is a StableDiffusionXLPipeline", config=str(sdxl))
    refused(
        write_original(sdxl, "sdxl", tmp_path / "xl.safetensors"), "is a StableDiffusionPipeline", config=str(model)
    )
    sd2 = make(tmp_path / "sd2", "sd2")
    two = write_original(sd2, "sd2", tmp_path / "two.safetensors")
    refused(two, "files do not say if they predict noise (512) or velocities (768): say it with --config")
    state = original(sdxl, "sdxl") | {"v_pred": torch.zeros(0)}
    save_file(state, tmp_path / "velocity.safetensors")
    refused(
        tmp_path / "velocity.safetensors", 'give the --config of a model where it is "v_prediction"', config=str(sdxl)
    )
    edit_json(sdxl / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert load(tmp_path / "velocity.safetensors", config=str(sdxl)).scheduler["prediction_type"] == "v_prediction"


@pytest.mark.slow
def test_export(checkpoint, engine, tmp_path):
    """The engine is the folder's; configurations come from the published model's repository, but no weights."""
    file = write_original(checkpoint, "sd1", tmp_path / "model.safetensors")
    config = shutil.copytree(checkpoint, tmp_path / "config")
    (config / "model_index.json").write_text(json.dumps(index("sd1")))
    (config / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not to be read")
    with serving(Hub()) as hub:
        hub.add("stable-diffusion-v1-5/stable-diffusion-v1-5", config)
        done = export(file, "-o", tmp_path / "engine", url=hub.url, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]
        assert "downloading stable-diffusion-v1-5/stable-diffusion-v1-5" in done.stderr
    exported = manifest(tmp_path / "engine")
    assert exported["source"]["id"] == "model.safetensors"
    assert exported["files"] == manifest(engine)["files"]  # bit by bit
    offline = export(file, "-o", tmp_path / "other", cache=tmp_path / "empty", HF_HUB_OFFLINE="1")
    fails(
        offline, "needs the configurations and tokenizers of stable-diffusion-v1-5/stable-diffusion-v1-5 (or --config"
    )
