"""The audit: what the embedded model prints; the folder, its journal, several processes; and bad input."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pipelines
import pytest
from audited import make_whole_checkpoint, write_pairs
from command_line import memedge
from PIL import Image
from safetensors.numpy import load_file

from memedge.audit import Audit, AuditSettings, audit, estimate, run
from memedge.embedded import captions
from memedge.engine.errors import ExportError, InputError, NotFiniteError

PAGE = Path(__file__).parents[3] / "docs/audit.md"
EMOJI = Path(__file__).parents[3] / "bench/tiny/emoji"
FILES = ["embeddings.safetensors", "report.html", "report.json", "sheet.png"]
SHORT = AuditSettings(steps=2, generations=2, inference_steps=2, rows=64)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_whole_checkpoint(tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs"), ["a", "b", "c"], ["true", "false", "false"])


@pytest.fixture
def drawings(tmp_path) -> Path:
    """A memorized picture with its caption, the same without, and one of a caption that is not memorized."""
    shown = [caption for caption in captions() if caption.strip]
    memorized = next(caption for caption in shown if caption.replicas == 16)
    clean = next(caption for caption in shown if caption.replicas == 0 and caption.group == "seen")
    rows = ["image,caption,memorized"]
    for name, caption, words in (("a", memorized, memorized.prompt), ("b", memorized, ""), ("c", clean, clean.prompt)):
        assert caption.strip
        Image.open(caption.strip).convert("RGB").crop((0, 0, 64, 64)).save(tmp_path / f"{name}.png")
        rows.append(f"{name}.png,{words},{str(caption.memorized).lower()}")
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "captions.csv"


def of_emoji(file: Path, steps: int) -> Audit:
    settings = AuditSettings(steps=steps, generations=3, guidance=4, inference_steps=10)
    found = audit(str(EMOJI), file.parent, file.parent / "report", captions=file, settings=settings)
    assert found is not None
    return found


def test_the_embedded_model_prints_what_it_memorized(drawings):
    """By its caption; and from a random embedding, without it."""
    drawings.write_text("\n".join(drawings.read_text().splitlines()[:3]) + "\n")
    found = of_emoji(drawings, 20)
    by_caption, by_search = found.images
    assert (by_caption.by_prompt, by_caption.by_audit, by_caption.steps) == (True, True, 0)
    assert (by_search.by_prompt, by_search.by_audit, by_search.start) == (None, True, "random")
    assert by_search.steps in (10, 20)
    (group,) = found.groups
    assert (group.name, group.by_audit.count, group.by_audit.of, group.within[0].count) == ("memorized", 2, 2, 1)
    assert group.by_prompt is not None
    assert group.by_prompt.of == 1


@pytest.mark.slow
def test_a_picture_that_is_not_memorized_takes_longer(drawings):
    lines = drawings.read_text().splitlines()
    drawings.write_text(f"{lines[0]}\n{lines[3]}\n")
    found = of_emoji(drawings, 10)
    (control,) = found.images
    assert (control.by_prompt, control.by_audit) == (False, False)
    assert {check.start for check in control.checks} == {"caption", "perturbed", "random"}
    assert (found.groups[0].name, found.groups[0].by_audit.count) == ("not memorized", 0)


def test_the_folder(whole, pairs, tmp_path):
    done = memedge(
        "audit", whole, "--images", pairs.parent, "--captions", pairs, "-o", tmp_path / "report", "--json",
        "--steps", 2, "--generations", 2, "--inference-steps", 2, "--batch-size", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "report"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    told = json.loads(done.stdout)
    assert json.loads((folder / "report.json").read_text()) == told
    assert [image["image"] for image in told["images"]] == ["0.png", "1.png", "2.png"]
    assert [len(image["checks"]) for image in told["images"]] == [4, 4, 4]  # the caption, then three starts
    assert {name: one.shape for name, one in load_file(folder / "embeddings.safetensors").items()} == {
        f"{place}.png": (16, 24) for place in range(3)
    }
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "Warning: Copies were told by outlines" in done.stderr
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.height > 3 * 16


def test_cautions(whole, tmp_path):
    """No controls; other sizes; pictures in no row. Names may lead into folders."""
    write_pairs(tmp_path / "all" / "some", ["a"], side=20)
    write_pairs(tmp_path / "all", ["b", "c"])
    (tmp_path / "captions.csv").write_text("file_name,caption\nsome/0.png,a\n")
    done = memedge(
        "audit", whole, "--images", tmp_path / "all", "--captions", tmp_path / "captions.csv",
        "-o", tmp_path / "report", "--steps", 1, "--inference-steps", 1, "--batch-size", 64,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "unlabelled" in done.stdout
    said = " ".join(done.stderr.split())
    assert "No picture is known not to be memorized" in said
    assert "1 picture had another size than 16 × 16 pixels" in said
    assert "2 pictures of the folder stand in no row" in said


def test_what_is_cut_off_goes_on_and_finds_the_same(whole, pairs, tmp_path, monkeypatch):
    at_once = audit(str(whole), pairs.parent, tmp_path / "once", captions=pairs, settings=SHORT)
    put, done = run.AuditJournal.put, []

    def killed(*arguments):
        if done:
            raise KeyboardInterrupt
        done.append(put(*arguments))

    monkeypatch.setattr(run.AuditJournal, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        audit(str(whole), pairs.parent, tmp_path / "again", captions=pairs, settings=SHORT)
    monkeypatch.setattr(run.AuditJournal, "put", put)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.partial", "once"]
    with pytest.raises(InputError, match="go on from it with --resume"):
        audit(str(whole), pairs.parent, tmp_path / "again", captions=pairs, settings=SHORT)
    with pytest.raises(InputError, match="choice of options"):
        other = AuditSettings(steps=3)
        audit(str(whole), pairs.parent, tmp_path / "again", captions=pairs, settings=other, resume=True)
    resumed = audit(str(whole), pairs.parent, tmp_path / "again", captions=pairs, settings=SHORT, resume=True)
    assert at_once is not None
    assert resumed is not None
    for one, two in zip(at_once.images, resumed.images, strict=True):
        assert one.checks == two.checks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "once"]


@pytest.mark.slow
def test_the_pages_commands_run(whole, tmp_path):
    """Every line of shell in docs/audit.md, on a random model."""
    shutil.copytree(whole, tmp_path / "checkpoint")
    for name, words in (("pictures", "a"), ("memorized", "a"), ("ordinary", "abcdefghijklmnopqrst")):
        write_pairs(tmp_path / name, list(words))
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line.partition("#")[0].split() for block in blocks for line in block.splitlines()]
    assert [line[1] for line in lines] == ["audit", "audit", "cure", "cure"]
    for line in lines:
        short = ("--steps", 2, "--generations", 1, "--inference-steps", 2, "--batch-size", 64)
        done = memedge(*line[1:], *short, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "sheet.png").is_file()
    assert (tmp_path / "cured" / "cure" / "cure.json").is_file()


@pytest.mark.slow
def test_processes_share_the_pictures(whole, pairs, tmp_path):
    """accelerate's launcher, two processes: the same as one."""
    options = ["--steps", "2", "--generations", "2", "--inference-steps", "2", "--captions", str(pairs)]
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2"]),
    ):
        module = ["-m", "memedge"] if name == "one" else ["--module", "memedge"]
        command = [*launcher, *module, "audit", str(whole), "--images", str(pairs.parent), *options]
        subprocess.run([*command, "-o", str(tmp_path / name)], check=True, cwd="/", timeout=300)
    one, two = (json.loads((tmp_path / name / "report.json").read_text())["images"] for name in ("one", "two"))
    assert [image["checks"] for image in one] == [image["checks"] for image in two]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_cost(whole, pairs):
    done = memedge("audit", whole, "--images", pairs.parent, "--captions", pairs, "--dry-run", "--json")
    cost = json.loads(done.stdout)
    # Three pictures of three starts: 50 steps of 8 draws; checks after 10, 20, 30 and 50, and of the caption before.
    assert cost["backward"] == 3 * 3 * 50 * 8
    assert cost["forward"] == 3 * (1 + 3 * 4) * 4 * 50 * 2
    assert cost["seconds"] > 0
    table = memedge("audit", whole, "--images", pairs.parent, "--dry-run").stdout
    assert re.search(r"UNet rows with gradients +1,200, at most", table)
    assert estimate(str(whole), pairs.parent).backward == 3 * 50 * 8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda model: shutil.rmtree(model / "vae"), ExportError, "holds no vae/config.json"),
        (lambda model: shutil.rmtree(model / "unet"), ExportError, "holds no unet"),
        (lambda model: shutil.rmtree(model), ExportError, "There is no"),
    ],
)
def test_checkpoints_that_cannot_be_audited(whole, pairs, tmp_path, change, error, words):
    model = shutil.copytree(whole, tmp_path / "model")
    change(model)
    with pytest.raises(error, match=words):
        audit(str(model), pairs.parent, tmp_path / "report")
    assert not list(tmp_path.glob("report*"))


def test_other_families_and_files_are_refused(pairs, tmp_path):
    model = pipelines.make(tmp_path / "model", "sdxl")
    with pytest.raises(ExportError, match="is SDXL: its pictures can't be audited"):
        audit(str(model), pairs.parent, tmp_path / "report")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="is a file, and a folder in diffusers' format is needed"):
        audit(str(tmp_path / "model.safetensors"), pairs.parent, tmp_path / "report")


def test_a_damaged_model_leaves_nothing(pairs, tmp_path):
    model = make_whole_checkpoint(tmp_path / "model", poison=float("nan"))
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        audit(str(model), pairs.parent, tmp_path / "report", settings=SHORT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_half_precision_is_read(whole, pairs, tmp_path):
    """A checkpoint that has its weights in half precision alone, as hubs keep a variant."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    model = shutil.copytree(whole, tmp_path / "model")
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        kind.from_pretrained(model / part).half().save_pretrained(model / part, variant="fp16")
        (model / part / "diffusion_pytorch_model.safetensors").unlink()
    found = audit(str(model), pairs.parent, tmp_path / "report", settings=SHORT)
    assert found is not None
    assert np.isfinite([image.similarity for image in found.images]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--steps", "2"], "There is no folder for the report"),
        (["-o", "nowhere/report"], "does not exist"),
        (["-o", "report", "--sscd", "none.pt"], "cannot be read as TorchScript"),
    ],
)
def test_one_sentence(whole, pairs, tmp_path, options, words):
    done = memedge("audit", whole, "--images", pairs.parent, *options, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
