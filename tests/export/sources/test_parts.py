"""Folders, the choice of weight files, and what is refused before anything is loaded."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from loading import assert_same, edit_json, load, refused
from pipelines import make
from safetensors.torch import load_file

from memedge.engine.errors import ExportError
from memedge.export.sources.folder import zeros_for_empty
from memedge.export.sources.weights import Weights, needed, weights

UNET = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("parts") / "model", "sd1")


@pytest.fixture
def copy(model, tmp_path) -> Path:
    """A copy of the model, to be changed."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_folder(kind, tmp_path):
    """The modules that the libraries load, whatever dtype they are stored in; half weights only ever widened."""
    half = load(make(tmp_path / "half", kind, "v_prediction", dtype=torch.float16))
    assert half.id == "half"
    assert half.scheduler["prediction_type"] == "v_prediction"
    assert half.notes == ()
    assert half.zeros_for_empty == (kind == "sdxl")  # as model_index.json says
    assert len(half.text_encoders) == len(half.tokenizers) == (2 if kind == "sdxl" else 1)
    stored = load_file(tmp_path / "half" / "unet" / f"{UNET}.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert all(torch.equal(tensor.float(), half.denoiser.state_dict()[name]) for name, tensor in stored.items())
    assert_same(half, load(tmp_path / "half" / ".." / "half" / "."))
    edit_json(tmp_path / "half" / "model_index.json", force_zeros_for_empty_prompt=False)
    assert not zeros_for_empty(tmp_path / "half", half.architecture)
    (tmp_path / "half" / "model_index.json").unlink()
    assert zeros_for_empty(tmp_path / "half", half.architecture) == (kind == "sdxl")


def test_hash(model, copy):
    """Of the files that are read: others do not matter, one bit of one of these does."""
    before = load(model)
    assert load(copy).sha256 == before.sha256
    (copy / "README.md").touch()
    (copy / "vae").mkdir()
    (copy / "vae" / "config.json").touch()
    (copy / "unet" / f"{UNET}.non_ema.safetensors").touch()
    assert load(copy).sha256 == before.sha256
    edit_json(copy / "scheduler" / "scheduler_config.json", steps_offset=0)
    assert load(copy).sha256 != before.sha256


def test_half_precision_copy(model, copy):
    """It is read where there is no other, and that is said."""
    for part, name in (("unet", UNET), ("text_encoder", "model")):
        (copy / part / f"{name}.safetensors").rename(copy / part / f"{name}.fp16.safetensors")
    told = []
    assert_same(load(model), load(copy, told))
    assert told == [f"reading {part} from its fp16 weights: it has no others" for part in ("unet", "text_encoder")]


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(model, copy, variant):
    """An index and what it names, in both libraries' spelling; before a single file in the UNet's, as diffusers."""
    whole = load(model)
    for path, module in ((copy / "unet", whole.denoiser), (copy / "text_encoder", whole.text_encoders[0])):
        for file in path.glob("*.safetensors"):
            file.unlink()
        module.save_pretrained(path, max_shard_size="20KB", variant=variant)
        assert len(list(path.glob("*-of-*"))) > 1
    assert_same(whole, load(copy))
    if variant is None:
        shutil.copy(model / "unet" / f"{UNET}.safetensors", copy / "unet")
        chosen = weights("unet", [p.relative_to(copy).as_posix() for p in copy.glob("unet/*")], "it", False)
        assert chosen.files[0] == f"unet/{UNET}.safetensors.index.json"
        (copy / "unet" / f"{UNET}.safetensors").unlink()
    shard = next((copy / "unet").glob("*-00002-of-*"))
    shard.rename(copy / "shard")
    refused(copy, "lacks shards of unet/")
    (copy / "shard").rename(shard)
    index = next((copy / "unet").glob("*.index*.json"))
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../elsewhere.safetensors"}}))
    refused(copy, "names other files than those beside it")


def test_choice():
    """Files that are safe before pickles, full precision before half, and never copies of other kinds."""

    def chosen(*names: str, allow_pickle: bool = True) -> Weights:
        return weights("text_encoder", [f"text_encoder/{name}" for name in names], "it", allow_pickle)

    everything = ["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin", "pytorch_model.fp16.bin"]
    for i, name in enumerate(everything):
        found = chosen(*everything[i:])
        assert found.files == (f"text_encoder/{name}",)
        assert (found.variant, found.pickled) == (("fp16" if "fp16" in name else None), "bin" in name)
    assert chosen("model.safetensors", "model.safetensors.index.json").files == ("text_encoder/model.safetensors",)
    for others in (["model.non_ema.safetensors"], ["flax_model.msgpack", "tf_model.h5", "model.onnx"], []):
        with pytest.raises(ExportError, match="holds no weights of text_encoder"):
            chosen(*others)
    with pytest.raises(ExportError, match=r"only as text_encoder/pytorch_model\.bin, which is a pickle"):
        chosen("pytorch_model.bin", allow_pickle=False)


def test_needed(model):
    """Everything that loading opens, and no more: a copy of these files alone is the same model."""
    names = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    others = ["vae/config.json", "unet/model.onnx", "text_encoder/flax_model.msgpack", "tokenizer/notes.txt"]
    assert set(needed([*names, *others], "it", False)) == set(names) - {"unet/README.md"}


def test_pickles(model, copy):
    """Read if allowed, and to the same modules."""
    for part, safe, name in (("unet", UNET, UNET), ("text_encoder", "model", "pytorch_model")):
        file = copy / part / f"{safe}.safetensors"
        torch.save(load_file(file), copy / part / f"{name}.bin")
        file.unlink()
    refused(copy, f"only as unet/{UNET}.bin, which is a pickle and can run code of its author")
    assert_same(load(model), load(copy, allow_pickle=True))


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("bomb"),))


def test_pickles_that_run_code(copy, tmp_path, monkeypatch):
    """Even if allowed, torch builds no objects but tensors and the like."""
    monkeypatch.chdir(tmp_path)
    (copy / "unet" / f"{UNET}.safetensors").unlink()
    (copy / "unet" / f"{UNET}.bin").write_bytes(pickle.dumps({"conv_in.weight": Bomb()}))
    refused(copy, "cannot be loaded", allow_pickle=True)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_part_missing(copy, part):
    shutil.rmtree(copy / part)
    refused(copy, f"holds no {part} folder, so it is not a diffusers-format model")


def test_damaged(copy, model):
    """Whatever a file has instead of what it should."""
    for name, content, words in (
        (f"unet/{UNET}.safetensors", b"version https://git-lfs.example/v1\noid", "is a git-lfs pointer"),
        (f"unet/{UNET}.safetensors", (model / f"unet/{UNET}.safetensors").read_bytes()[:1000], "cannot be loaded"),
        ("text_encoder/model.safetensors", b"", "cannot be loaded"),
        ("unet/config.json", b"{", "cannot be loaded"),
        ("scheduler/scheduler_config.json", b"[]", "cannot be loaded (no JSON object)"),
        ("tokenizer/tokenizer.json", b"{}", "cannot be loaded"),
        ("unet/config.json", b'{"_class_name": "UNet3DConditionModel"}', "is a UNet3DConditionModel: memedge exports"),
        ("text_encoder/config.json", b'{"model_type": "t5"}', "is a t5: memedge exports Stable Diffusion"),
    ):
        (copy / name).write_bytes(content)
        refused(copy, words)
        shutil.copy(model / name, copy / name)
    (copy / "unet" / "config.json").unlink()
    refused(copy, "holds no unet/config.json: it is incomplete")


def test_weights_that_do_not_fit(copy):
    """Never random numbers in place of what is missing, nor anything dropped."""
    edit_json(copy / "text_encoder" / "config.json", num_hidden_layers=3)
    refused(copy, "text_encoder lack encoder.layers.2.layer_norm1.bias, unlike its config.json")
    edit_json(copy / "text_encoder" / "config.json", num_hidden_layers=2)
    edit_json(copy / "unet" / "config.json", transformer_layers_per_block=2)
    refused(copy, "unet lack down_blocks.0.attentions.0.transformer_blocks.1.attn1.to_k.weight, unlike its config.json")
    edit_json(copy / "unet" / "config.json", transformer_layers_per_block=1, mid_block_type=None)
    refused(copy, "unet hold mid_block.")


def test_dispatch(model, tmp_path, monkeypatch):
    """Every form in its place; options that a form does not have are errors."""
    forms = "give a folder in diffusers' format or exported by Optimum, a .safetensors file, or the id of a model"
    for absent in (tmp_path / "absent", "absent", "./org/name", "../org/name", "org/name.safetensors", "a/b/c"):
        refused(absent, forms)
    refused(model, "A revision (main) is of a model on a hub", revision="main")
    refused("absent", "A revision (main) is of a model on a hub", revision="main")
    refused(model, "is for a single file, which", config=str(model))
    refused("org/name", "is for a single file, which org/name is not", config=str(model))
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", "is no checkpoint: memedge reads .safetensors files")
    (tmp_path / "org").mkdir()
    shutil.copytree(model, tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert load("org/name").id == "name"  # the folder wins over the hub
