"""LoRAs: fused weights are W + scale · alpha/rank · up · down, in every format; and those that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from hub_process import export, fails, manifest
from loading import load, modules, outputs, refused
from loras import Changes, write_diffusers, write_kohya, write_peft
from pipelines import make
from safetensors.torch import load_file, save_file

from memedge.engine.errors import ExportError
from memedge.export.sources.lora import parse
from memedge.export.sources.parts import Parts

SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder of each architecture."""
    return {kind: make(tmp_path_factory.mktemp("lora") / kind, kind) for kind in ("sd1", "sd2", "sdxl")}


@pytest.fixture(scope="module")
def parts(folders) -> dict[str, Parts]:
    """What is in them, never changed."""
    return {kind: load(folder) for kind, folder in folders.items()}


def check(fused: Parts, before: Parts, changes: Changes) -> None:
    """Exactly the layers of the file have changed, as said; nothing of PEFT is left."""
    was = modules(before)
    for part, module in modules(fused).items():
        assert module.state_dict().keys() == was[part].state_dict().keys()
        assert not hasattr(module, "peft_config")
        assert not any("peft" in type(layer).__module__ for layer in module.modules())
        assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
        for name, tensor in module.state_dict().items():
            assert tensor.dtype == torch.float32
            layer, _, leaf = name.rpartition(".")
            if leaf == "weight" and (part, layer) in changes:
                truth = changes[part, layer]
                assert (tensor.double() - truth).abs().max() < 1e-6 * truth.abs().max(), name
                assert not torch.equal(tensor, was[part].state_dict()[name])
            else:
                assert torch.equal(tensor, was[part].state_dict()[name]), name
    outputs(fused)


@pytest.mark.parametrize(
    ("write", "dtype"), [(write_kohya, torch.float16), (write_peft, torch.float16), (write_diffusers, torch.float32)]
)
@pytest.mark.parametrize("kind", ["sd1", pytest.param("sd2", marks=SLOW), pytest.param("sdxl", marks=SLOW)])
def test_fused_weights(kind, write, dtype, folders, parts, tmp_path):
    """Of the UNet and each text encoder, with ranks and alphas that differ from layer to layer."""
    changes = write(tmp_path / "style.safetensors", modules(parts[kind]), 0.7, dtype)
    assert {part for part, _ in changes} == modules(parts[kind]).keys()
    fused = load(folders[kind], loras=[f"{tmp_path}/style.safetensors:0.7"])
    check(fused, parts[kind], changes)
    assert fused.id == f"{kind} + style.safetensors:0.7"
    assert fused.sha256 != parts[kind].sha256


def test_sgm_names(folders, parts, tmp_path):
    """SDXL's trainers number blocks as the original layout does."""
    changes = write_kohya(tmp_path / "style.safetensors", modules(parts["sdxl"]), 1, sgm=True)
    assert any("lora_unet_middle_block_1_" in name for name in load_file(tmp_path / "style.safetensors"))
    check(load(folders["sdxl"], loras=[f"{tmp_path}/style.safetensors"]), parts["sdxl"], changes)


def test_alpha_in_the_header(folders, parts, tmp_path):
    """PEFT's alphas are in the file's metadata."""
    unet = {"unet": parts["sd1"].denoiser}
    changes = write_peft(tmp_path / "style.safetensors", unet, 2 * 5 / 3)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"]}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in settings.items()})}
    save_file(load_file(tmp_path / "style.safetensors"), tmp_path / "style.safetensors", metadata=header)
    check(load(folders["sd1"], loras=[f"{tmp_path}/style.safetensors:2"]), parts["sd1"], changes)


def test_several(folders, parts, tmp_path):
    """One after another: the second changes what the first has made; the id and the hash know of both."""
    unet = {"unet": parts["sd1"].denoiser}
    first = write_kohya(tmp_path / "first.safetensors", unet, -0.5)
    second = write_kohya(tmp_path / "second.safetensors", unet, 1)
    both = {key: first[key] + second[key] - unet["unet"].get_submodule(key[1]).weight.double() for key in first}
    names = [f"{tmp_path}/first.safetensors:-0.5", f"{tmp_path}/second.safetensors"]
    fused = load(folders["sd1"], loras=names)
    check(fused, parts["sd1"], both)
    assert fused.id == "sd1 + first.safetensors:-0.5 + second.safetensors:1"
    hashes = {fused.sha256, load(folders["sd1"], loras=names[1:]).sha256, parts["sd1"].sha256}
    assert len({*hashes, load(folders["sd1"], loras=[f"{tmp_path}/first.safetensors", names[1]]).sha256}) == 4


def test_pickle(folders, parts, tmp_path):
    """Read if allowed."""
    changes = write_kohya(tmp_path / "style.safetensors", modules(parts["sd1"]), 1)
    file = tmp_path / "style.bin"
    torch.save(load_file(tmp_path / "style.safetensors"), file)
    refused(folders["sd1"], "style.bin is a pickle and can run code of its author", loras=[str(file)])
    check(load(folders["sd1"], loras=[str(file)], allow_pickle=True), parts["sd1"], changes)


def test_refused(folders, parts, tmp_path):
    """Of another architecture or kind, in all or in some layers: never fused in part."""
    file = tmp_path / "style.safetensors"

    def refuse(words: str, kind: str = "sd1") -> None:
        refused(folders[kind], words, loras=[str(file)])

    for other, kind in (("sdxl", "sd1"), ("sd1", "sdxl"), ("sd2", "sd1"), ("sd1", "sd2")):
        for write in (write_kohya, write_peft):
            write(file, modules(parts[other]), 1)
            refuse("it is a LoRA for another architecture", kind)
    write_peft(file, modules(parts["sd1"]), 1)
    state = load_file(file)
    name = next(iter(state))
    for extra, words in (
        ({"unet.absent.to_q.lora_A.weight": torch.ones(3, 16)}, "it is a LoRA for another architecture"),
        ({name: torch.ones(3, 15)}, "it is a LoRA for another architecture"),
        ({name.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}, "is not a plain LoRA"),
    ):
        save_file(state | extra, file)
        refuse(words)
    lokr = {"lora_unet_mid_block_attentions_0_proj_in.lokr_w1": torch.ones(2, 2)}
    for tensors, words in (
        ({"a": torch.ones(1)}, "is no LoRA: it holds no up and down matrices"),
        ({"transformer.blocks.0.lora_A.weight": torch.ones(2, 2)}, "it is a LoRA for another architecture"),
        (lokr, "is not a plain LoRA, but holds a LoKr (lora_unet_mid_block_attentions_0_proj_in.lokr_w1)"),
    ):
        save_file(tensors, file)
        refuse(words)
    file.write_bytes(b"\0" * 20)
    refuse("style.safetensors cannot be loaded (")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("{}.dora_scale", "a DoRA"),
        ("{}.hada_w1_a", "a LoHa"),
        ("{}.oft_blocks", "an OFT"),
        ("{}.lora_mid.weight", "a LoRA in Tucker's decomposition"),
        ("{}.a1.weight", "a GLoRA"),
        ("{}.on_input", "an (IA)³"),
        ("lora_te_text_model_encoder_layers_0_layer_norm1.w_norm", "LyCORIS norms"),
        ("{}.scalar", "LyCORIS scalars"),
        ("lora_unet_conv_in.diff", "whole differences of weights"),
        ("lora_unet_conv_in.diff_b", "whole differences of weights"),
        ("bundle_emb.word.string_to_param.*", "bundled textual inversions"),
        ("{}.lora_up.bias", "biases"),
        ("lora_controlnet", "a Control-LoRA"),
        ("{}.lora_new.weight", "{}.lora_new.weight, which memedge does not know"),
    ],
)
def test_other_kinds_are_named(name, kind, folders, parts, tmp_path):
    """What a file holds besides up and down matrices is no other architecture; without it, the file is fused."""
    file, stem = tmp_path / "style.safetensors", "lora_unet_mid_block_attentions_0_proj_in"
    write_kohya(file, {"unet": parts["sd1"].denoiser}, 1)
    save_file(load_file(file) | {name.format(stem): torch.ones(2)}, file)
    refused(folders["sd1"], f"is not a plain LoRA, but holds {kind.format(stem)}", loras=[str(file)])


def test_sgm_names_are_no_differences(folders, tmp_path):
    """Dots and "diffusion_model" in a name are not the ending that differences have."""
    file = tmp_path / "style.safetensors"
    save_file({"model.diffusion_model.middle.lora_A.weight": torch.ones(2, 2)}, file)
    refused(folders["sd1"], "it is a LoRA for another architecture", loras=[str(file)])


def test_names_and_scales(tmp_path, monkeypatch):
    """What follows the last colon is a scale if it is a number."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.safetensors", "c:a.safetensors", "a:0.5.safetensors"):
        Path(name).touch()
    for text, name, scale in (
        ("a.safetensors", "a.safetensors", 1),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        ("c:a.safetensors", "c:a.safetensors", 1),
        ("c:a.safetensors:2", "c:a.safetensors", 2),
        ("a:0.5.safetensors", "a:0.5.safetensors", 1),
    ):
        assert (str(parse(text, False).path), parse(text, False).scale) == (name, scale)
    for text, words in (
        ("a.safetensors:nan", "The scale of LoRA a.safetensors is nan"),
        ("a.safetensors:inf", "The scale of LoRA a.safetensors is inf"),
        ("a.safetensors:0", "The scale of LoRA a.safetensors is 0"),
        ("a.safetensors:strong", "There is no LoRA file a.safetensors:strong"),
        ("a.safetensors:", "There is no LoRA file a.safetensors:"),
        ("b.safetensors", "There is no LoRA file b.safetensors"),
        (":0.5", "There is no LoRA file :0.5"),
        (".", "There is no LoRA file ."),
    ):
        with pytest.raises(ExportError, match=words):
            parse(text, False)
    Path("a.onnx").touch()
    with pytest.raises(ExportError, match="is no LoRA: memedge reads"):
        parse("a.onnx", False)


@pytest.mark.slow
def test_export(checkpoint, engine, folders, tmp_path):
    """The engine has the fused weights, as torch, with which it is compared; a LoRA that does not fit leaves none."""
    write_kohya(tmp_path / "style.safetensors", modules(load(checkpoint)), 0.1)
    lora = f"{tmp_path}/style.safetensors:0.1"
    done = export(checkpoint, "-o", tmp_path / "engine", "--lora", lora)
    assert done.returncode == 0, done.stderr
    exported, plain = manifest(tmp_path / "engine"), manifest(engine)
    assert exported["source"]["id"] == "random + style.safetensors:0.1"
    changed = {name for name in plain["files"] if plain["files"][name] != exported["files"][name]}
    weights = {"text_encoder.onnx", "prefix.onnx", "noise_gradient.onnx", "unet.onnx.data"}
    assert changed == weights | {"baseline.safetensors"}
    wrong = export(folders["sdxl"], "-o", tmp_path / "third", "--lora", lora)
    fails(wrong, "it is a LoRA for another architecture")
    assert not (tmp_path / "third").exists()
