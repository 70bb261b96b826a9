"""Models that say they are others than what would be exported are refused, from every source; remedies help."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from loading import edit_json, load, refused
from original_layout import original, write_original
from pipelines import make
from safetensors.torch import save_file

from memedge.engine.errors import ExportError
from memedge.export.sources import check_traits, traits
from memedge.export.sources.architectures import ARCHITECTURES
from memedge.export.sources.check_traits import check_folder, check_index, check_tensors
from memedge.wording import listed

FILES = {
    "unet/config.json": traits.UNET,
    "scheduler/scheduler_config.json": traits.SCHEDULER,
    "text_encoder/config.json": traits.CLIP_TEXT,
    "model_index.json": traits.PIPELINE,
}
TRAITS = [(file, field) for file, table in FILES.items() for field in table.traits]
BETAS = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp("traits") / kind, kind) for kind in ("sd1", "sdxl")}


@pytest.fixture
def copy(models, tmp_path) -> Path:
    """A model to be changed."""
    return shutil.copytree(models["sd1"], tmp_path / "model")


def says(folder: Path, words: str) -> None:
    """The configurations are refused in one sentence that has these words."""
    with pytest.raises(ExportError, match=re.escape(words)) as caught:
        check_folder(folder, ARCHITECTURES[0])
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(("file", "field"), TRAITS)
def test_every_trait(file, field, copy):
    """Another value is refused, by field, value and file; the values that the message names pass."""
    trait = FILES[file].traits[field]
    edit_json(copy / file, **{field: "odd"})
    says(copy, f'{copy / file} has {field} "odd", so {trait.meaning}: memedge exports models where it is ')
    for value in trait.allowed:
        edit_json(copy / file, **{field: value})
        assert check_folder(copy, ARCHITECTURES[0]) == ()


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("unet/config.json", {"up_block_types": ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]}, "up_block_types"),
        ("unet/config.json", {"in_channels": 9}, "takes 9 channels and gives 4: inpainting"),
        ("unet/config.json", {"out_channels": 8}, "has out_channels 8, so its UNet predicts a variance, too"),
        ("scheduler/scheduler_config.json", {"timestep_type": "continuous"}, "timestep_type"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "predicts a variance"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "it was trained by flow matching"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "is of EDMEulerScheduler"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "hides padding from the text encoder"),
        (
            "text_encoder/config.json",
            {"text_config": {"use_attention_mask": True}},
            "hides padding from the text encoder",
        ),
        ("unet/config.json", {"in_channels": None}, "takes None channels and gives 4"),
        ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, 'is a ["pipeline", "Mine"], as its'),
        ("model_index.json", {"unet": ["mine", "MyUNet"]}, "has a unet of class MyUNet"),
        ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "has a scheduler of class EDM"),
    ],
)
def test_folders_that_are_other_models(file, change, words, copy):
    """Nothing is loaded of them."""
    edit_json(copy / file, **change)
    refused(copy, words)


@pytest.mark.parametrize("size", [None, 0, 64.5, True, "64", [64], [64, None]])
def test_sample_size(size, copy):
    file = copy / "unet/config.json"
    edit_json(file, sample_size=size)
    says(copy, f"{file} has sample_size {json.dumps(size)}: write the size there that the model was trained for")
    for good in (64, [64, 96]):
        edit_json(file, sample_size=good)
        assert check_folder(copy, ARCHITECTURES[0]) == ()


def test_sample_size_of_an_old_diffusers(copy):
    """Pipelines take it for 64."""
    file = copy / "unet/config.json"
    edit_json(file, sample_size=32, _diffusers_version="0.6.0")
    says(copy, "has sample_size 32, which pipelines take for 64, because diffusers 0.6 wrote it")
    for remedy in ({"sample_size": 64}, {"_diffusers_version": "0.10.0"}, {"_diffusers_version": None}):
        edit_json(file, **{"sample_size": 32, "_diffusers_version": "0.6.0", **remedy})
        assert check_folder(copy, ARCHITECTURES[0]) == ()


@pytest.mark.parametrize("file", FILES)
def test_unknown_fields(file, copy, monkeypatch):
    """What is off passes, and what has the default of the installed library's class; the rest is refused or noted."""
    edit_json(copy / file, later=None, another=[], third=False)
    assert check_folder(copy, ARCHITECTURES[0]) == ()
    edit_json(copy / file, later="new")
    if FILES[file].strict:
        says(
            copy, f'{copy / file} has later "new", which neither memedge nor the installed diffusers knows: take it out'
        )
    else:
        name = Path(file).name
        assert check_folder(copy, ARCHITECTURES[0]) == (f"{name} has later, which nobody knows here: it was left out.",)
    monkeypatch.setattr(check_traits, "_defaults", lambda _library, _kind: {"later": "new"})
    assert check_folder(copy, ARCHITECTURES[0]) == ()
    edit_json(copy / file, later="newest")
    says(copy, f'{copy / file} has later "newest", so it is of a kind that memedge does not know: memedge exports')


def test_defaults_are_the_classes_own():
    """As JSON has them; a class that is not there has none."""
    defaults = check_traits._defaults("diffusers", "UNet2DConditionModel")
    assert defaults["up_block_types"][0] == "UpBlock2D" and "self" not in defaults
    assert check_traits._defaults("diffusers", "AbsentScheduler") == {}


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_known_schedulers_pass(name, copy):
    (copy / "scheduler/scheduler_config.json").write_text(json.dumps(architectures.ARCHITECTURES[name].scheduler))
    assert check_folder(copy, ARCHITECTURES[0]) == ()


def test_distilled_models_are_noted(copy):
    edit_json(copy / "scheduler/scheduler_config.json", _class_name="LCMScheduler")
    assert load(copy).notes == (
        "LCMScheduler is for models that were distilled to few steps: what was published of detectors is of others.",
    )


def test_components(copy):
    """A ControlNet or whatever else a pipeline takes besides its family's parts; without it, the model is exported."""
    edit_json(copy / "model_index.json", controlnet=["diffusers", "ControlNetModel"])
    says(copy, "has a controlnet (ControlNetModel), which memedge does not export: take it out if pictures are")
    edit_json(copy / "model_index.json", controlnet=[None, None])
    assert check_folder(copy, ARCHITECTURES[0]) == ()
    (copy / "text_encoder/adapter_config.json").write_text("{}")
    says(copy, "adapter_config.json adds an adapter to the weights: take it out")
    (copy / "text_encoder/adapter_config.json").unlink()
    assert check_folder(copy, ARCHITECTURES[0]) == ()


def test_another_family(tmp_path):
    """Its class is named, and none of its files is offered."""
    for name in ("transformer", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    (tmp_path / "flux1-dev.safetensors").touch()
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    families = listed([row.name for row in ARCHITECTURES], "and")
    refused(tmp_path, f"is a FluxFillPipeline, as its model_index.json says: memedge exports {families}.")
    with pytest.raises(ExportError, match=r"^org/name is a FluxFillPipeline"):
        check_index(tmp_path / "model_index.json", "org/name")


def test_a_folder_with_one_file(models, tmp_path):
    """The file that the message names can be given."""
    file = write_original(models["sd1"], "sd1", tmp_path / "model.safetensors")
    refused(tmp_path, "if model.safetensors is a whole checkpoint, give that file")
    assert load(file, config=str(models["sd1"])).notes == ()


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"edm_mean": (4,), "edm_std": (4,)}, "has the tensor edm_mean, so it was trained on EDM's noise levels"),
        ({"edm_vpred.sigma_max": ()}, "has the tensor edm_vpred.sigma_max, so it was trained on EDM's"),
        ({"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}, "so it holds a ControlNet"),
        ({"conditioner.embedders.2.weight": (16, 16)}, "so it takes more conditions than a prompt"),
        ({"flow": (0,)}, "has the tensor flow, which may say how it was trained"),
        ({"v_pred": (0,)}, 'has prediction_type "epsilon": give the --config of a model where it is "v_prediction"'),
        ({"ztsnr": (0,)}, "has rescale_betas_zero_snr false: give the --config of a model where it is true"),
    ],
)
def test_marker_tensors(tensors, words):
    with pytest.raises(ExportError, match=re.escape(words)):
        check_tensors(Path("file.safetensors"), tensors, {}, BETAS)


def test_tensors_that_pass():
    """Schedules, averaged weights, the VAE; markers that the configuration agrees with; other modules are noted."""
    known = {"betas": (1000,), "model_ema.decay": (), "first_stage_model.encoder.conv_in.bias": (8,)}
    assert check_tensors(Path("file"), known, {}, BETAS) == ()
    velocities = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert check_tensors(Path("file"), {"v_pred": (0,), "ztsnr": (0,)}, {}, velocities) == ()
    notes = check_tensors(Path("file"), {"loss.weight": (9, 9)}, {}, BETAS)
    assert notes == ("1 tensor of file left out, such as loss.weight.",)


@pytest.mark.parametrize(("said", "own"), [("v", "epsilon"), ("epsilon", "v_prediction"), ("edm", "epsilon")])
def test_headers(said, own):
    """modelspec's prediction type."""
    with pytest.raises(ExportError, match=re.escape(f"has modelspec.prediction_type {said!r} in its header")):
        check_tensors(Path("file"), {}, {"modelspec.prediction_type": said}, {"prediction_type": own})
    predicts: dict[str, Any] = {"prediction_type": traits.PREDICTIONS.get(said, said)}
    assert check_tensors(Path("file"), {}, {"modelspec.prediction_type": said}, predicts) == ()


def test_single_files(models, tmp_path):
    """Their tensors, header and configuration are all looked at."""
    state, config, file = original(models["sdxl"], "sdxl"), str(models["sdxl"]), tmp_path / "file.safetensors"
    save_file(state | {"edm_mean": torch.zeros(4)}, file)
    refused(file, "has the tensor edm_mean", config=config)
    save_file(state, file, metadata={"modelspec.prediction_type": "v"})
    refused(file, "has modelspec.prediction_type 'v' in its header", config=config)
    changed = shutil.copytree(config, tmp_path / "changed")
    edit_json(changed / "scheduler/scheduler_config.json", timestep_type="continuous")
    refused(file, 'has timestep_type "continuous"', config=str(changed))
