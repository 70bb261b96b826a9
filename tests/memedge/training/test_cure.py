"""The cure: what it trains on, that it goes on where it was cut off, the checkpoint that it writes, and bad input."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from audited import make_whole_checkpoint, write_pairs
from command_line import memedge
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.numpy import load_file

from memedge.audit import AuditSettings, Outlines
from memedge.autograd.diffusion_model import DiffusionModel
from memedge.engine.errors import InputError, NotFiniteError
from memedge.training import CureSettings, cure, forgetting
from memedge.training.forgetting import Forgetting, Memorized, Ordinary
from memedge.training.surrogates import MARGIN, MOST, Surrogates

SHORT = CureSettings(epochs=1, rate=1e-3, audit=AuditSettings(steps=2, generations=2, inference_steps=2, rows=64))
OPTIONS = ("--steps", 2, "--generations", 2, "--inference-steps", 2, "--epochs", 1, "--batch-size", 64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_whole_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def memorized(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("memorized"), ["a", "b", "c"], ["true", "true", "false"])


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("ordinary"), [f"caption {k}" for k in range(20)])


@pytest.fixture
def few_updates(monkeypatch):
    """Two after each search, for what is not about learning."""
    monkeypatch.setattr(forgetting, "UPDATES", 2)


def training(whole: Path, rate: float = 1e-3, epochs: int = 2) -> tuple[DiffusionModel, Forgetting]:
    """Two pictures that are to be forgotten, four that are not."""
    model, generator = DiffusionModel(str(whole)), torch.Generator().manual_seed(5)

    def latents(count: int) -> torch.Tensor:
        return torch.randn(count, *model.shape, generator=generator)

    memorized = [Memorized(name, name, latents(1)[0], latents(2)) for name in ("a", "b")]
    ordinary = Ordinary(latents(4), ["c", "d", "e", "f"])
    accelerator = Accelerator(cpu=True)
    more = {"epochs": epochs, "rate": rate, "steps": 4, "rows": 64, "seed": 0, "accelerator": accelerator}
    return model, Forgetting(model, memorized, ordinary, **more)


def test_surrogates_learn_their_place(whole, tmp_path):
    """The loss on surrogates under the captions, and on the ordinary pairs, falls; the other weights stay."""
    model, forgetting_ = training(whole, epochs=3)
    ordinary, memorized = forgetting_._ordinary, forgetting_._memorized
    kept = [value.clone() for value in model._text_encoder.parameters()]

    def losses() -> tuple[float, float]:
        generator = torch.Generator().manual_seed(9)
        found = []
        for latents, captions in (
            (torch.cat([one.surrogates for one in memorized]), ["a", "a", "b", "b"]),
            (ordinary.latents, ordinary.captions),
        ):
            noise, timesteps = torch.randn(latents.shape, generator=generator), torch.tensor([900, 700, 500, 300])
            with torch.no_grad():
                found.append(float(model.loss(latents, noise, timesteps, model.encode(captions)).mean()))
        return found[0], found[1]

    before = losses()
    forgetting_.run(tmp_path / "state.pt", lambda _done, _total: None)
    after = losses()
    assert after[0] < 0.9 * before[0]
    assert after[1] < 0.9 * before[1]
    for value, other in zip(kept, model._text_encoder.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in model.unet.parameters())


@pytest.mark.usefixtures("few_updates")
def test_training_goes_on_where_it_was_cut_off(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(forgetting, "SAVE_SECONDS", 0.0)
    straight, at_once = training(whole)
    at_once.run(tmp_path / "once.pt", lambda _done, _total: None)

    def stop(done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    _, cut = training(whole)
    with pytest.raises(KeyboardInterrupt):
        cut.run(tmp_path / "again.pt", stop)
    model, again = training(whole)
    again.run(tmp_path / "again.pt", lambda _done, _total: None)
    assert again.done == 2
    for one, two in zip(straight.unet.parameters(), model.unet.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_training_that_diverges_is_said(whole, tmp_path):
    _, wild = training(whole, rate=1e30)
    with pytest.raises(NotFiniteError, match="begin anew with a smaller --rate"):
        wild.run(tmp_path / "state.pt", lambda _done, _total: None)
    assert not list(tmp_path.iterdir())


def test_surrogates_are_no_copies(whole):
    model, similarity = DiffusionModel(str(whole)), Outlines()
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    states = model.encode(["a"])[0]
    latents, of_caption = Surrogates(model, similarity, 4.0, 2, 8, 0)("a", picture, states)
    target = similarity.descriptors(model.pictures(model.latents(picture[None])))[0]
    similar = similarity.descriptors(model.pictures(latents)) @ target
    assert of_caption
    assert 1 <= len(latents) <= MOST
    assert (similar < similarity.copy - MARGIN).all()

    class Alike(Outlines):
        """Finds everything a copy."""

        def descriptors(self, pictures):
            return torch.ones(len(pictures), 1)

    _, of_caption = Surrogates(model, Alike(), 4.0, 2, 8, 0)("a", picture, states)
    assert not of_caption


@pytest.mark.usefixtures("few_updates")
def test_the_new_checkpoint(whole, memorized, ordinary, tmp_path):
    done = memedge(
        "cure", whole, "--memorized", memorized, "--ordinary", ordinary, "-o", tmp_path / "new", *OPTIONS, "--json"
    )
    assert done.returncode == 0, done.stderr
    new = tmp_path / "new"
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert sorted(path.name for path in (new / "cure").iterdir()) == ["after", "before", "cure.json"]
    told = json.loads(done.stdout)
    assert json.loads((new / "cure" / "cure.json").read_text()) == told
    assert (told["memorized"], told["ordinary"]) == (2, 20)
    assert [(group["name"], group["images"]) for group in told["after"]] == [("memorized", 2), ("not memorized", 1)]
    audits = [json.loads((new / "cure" / name / "report.json").read_text()) for name in ("before", "after")]
    assert [one["checkpoint"] for one in audits] == ["model", "new"]
    assert audits[0]["checkpoint_sha256"] == told["checkpoint_sha256"] != audits[1]["checkpoint_sha256"]
    old, cured = (UNet2DConditionModel.from_pretrained(folder / "unet").state_dict() for folder in (whole, new))
    assert old.keys() == cured.keys()
    assert all(not torch.equal(old[name], cured[name]) for name in old if name.endswith("to_v.weight"))
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        for file in (whole / part).iterdir():
            assert file.read_bytes() == (new / part / file.name).read_bytes()
    DiffusionModel(str(new))


def test_the_embedded_model_stays_a_pipeline(tmp_path):
    """What is saved of a checkpoint in half precision is in half precision, and loads in diffusers."""
    model = DiffusionModel(str(Path(__file__).parents[3] / "bench/tiny/emoji"))
    model.save(tmp_path / "new")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "new")
    assert (
        load_file(tmp_path / "new" / "unet" / "diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype
        == np.float16
    )
    assert isinstance(pipeline, StableDiffusionPipeline)
    for name, value in UNet2DConditionModel.from_pretrained(tmp_path / "new" / "unet").state_dict().items():
        torch.testing.assert_close(value, model.unet.state_dict()[name].half().float(), rtol=0, atol=0)


@pytest.mark.usefixtures("few_updates")
def test_a_run_that_was_cut_off(whole, memorized, ordinary, tmp_path):
    def stop(what: str, _done: int, _total: int) -> None:
        if what == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cure(str(whole), memorized, ordinary, tmp_path / "new", settings=SHORT, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["new.partial"]
    with pytest.raises(InputError, match="go on with it with --resume"):
        cure(str(whole), memorized, ordinary, tmp_path / "new", settings=SHORT)
    other = CureSettings(epochs=2, rate=1e-3, audit=SHORT.audit)
    with pytest.raises(InputError, match="of another checkpoint, or of other pictures, captions or options"):
        cure(str(whole), memorized, ordinary, tmp_path / "new", settings=other, resume=True)
    stages: list[str] = []
    cure(
        str(whole), memorized, ordinary, tmp_path / "new", settings=SHORT, resume=True,
        progress=lambda what, _done, _total: stages.append(what),
    )  # fmt: skip
    assert "auditing before" not in stages
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.slow
def test_a_full_disk(whole, memorized, ordinary, tmp_path):
    """The journal and the state are small beside the checkpoint: its weights do not fit."""
    limit = 200_000  # bytes of a file
    command = [sys.executable, "-m", "memedge", "cure", str(whole), "--memorized", str(memorized), "--ordinary"]
    command += [str(ordinary), "-o", str(tmp_path / "new"), *map(str, OPTIONS)]
    done = subprocess.run(
        command, cwd="/", capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if line.startswith("memedge:")]) == 1
    assert "File too large" in done.stderr
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob("*/*.pt*"))


@pytest.mark.slow
def test_processes_share_the_work(whole, memorized, ordinary, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--module", "memedge"]
    command += ["cure", str(whole), "--memorized", str(memorized), "--ordinary", str(ordinary)]
    subprocess.run([*command, "-o", str(tmp_path / "new"), *map(str, OPTIONS)], check=True, cwd="/", timeout=500)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_cost(whole, memorized, ordinary):
    done = memedge("cure", whole, "--memorized", memorized, "--ordinary", ordinary, "--dry-run", "--json")
    cost = json.loads(done.stdout)
    # Two pictures are one search of four, in each of 5 epochs, of 50 steps of 8 draws; 16 updates of 16 rows each.
    assert (cost["searches"], cost["updates"]) == (5 * 4 * 50 * 8, 5 * 16 * 16)
    assert cost["audits"][1] == 2 * 3 * 3 * 50 * 8
    assert cost["seconds"] > 0
    assert (
        "rows with gradients of weights"
        in memedge("cure", whole, "--memorized", memorized, "--ordinary", ordinary, "--dry-run").stdout
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("0.png,a", "0.png,"), "no caption for '0.png'"),
        (lambda text: text.replace("true", "false"), "marks all its pictures as not memorized"),
        (lambda text: text.replace("0.png", "none.png"), "are not in"),
    ],
)
def test_bad_input(whole, memorized, ordinary, tmp_path, change, words):
    folder = shutil.copytree(memorized.parent, tmp_path / "pairs")
    (folder / "captions.csv").write_text(change((folder / "captions.csv").read_text()))
    done = memedge(
        "cure", whole, "--memorized", folder / "captions.csv", "--ordinary", ordinary, "-o", tmp_path / "new"
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


def test_few_ordinary_pairs_and_a_rate_of_none(whole, memorized, tmp_path):
    with pytest.raises(InputError, match="has 3 pairs: give at least 20"):
        cure(str(whole), memorized, memorized, tmp_path / "new")
    with pytest.raises(InputError, match="a rate above 0"):
        cure(str(whole), memorized, memorized, tmp_path / "new", settings=CureSettings(rate=0.0))
