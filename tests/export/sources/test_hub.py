"""Models on a hub, a stand-in on localhost: what is asked for, what is told, and the cache without a network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hub_process import run
from hub_server import Hub, serving
from pipelines import make

# Downloads one model after another, and prints for each its folder and what was told, or the error.
DOWNLOAD = """
import json, sys
from memedge.engine.errors import ExportError
from memedge.export.sources import hub, weights
results = []
for model, revision in json.loads(sys.argv[1]):
    told = []
    try:
        choose = lambda names, kind: weights.needed(names, model, False, kind)
        folder = hub.download(model, revision, choose, told.append)
        results.append({"folder": str(folder), "told": told})
    except ExportError as error:
        results.append({"error": str(error), "told": told})
print(json.dumps(results))
"""
SETTINGS = {
    "model_index.json",
    "unet/config.json",
    "text_encoder/config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
}


def download(calls: list[tuple[str, str | None]], url: str, cache: Path, **environment: str) -> list[dict]:
    done = run(["-c", DOWNLOAD, json.dumps(calls)], url, cache, **environment)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert all("\n" not in result.get("error", "") for result in results)
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model with all that a repository holds besides what is needed."""
    folder = make(tmp_path_factory.mktemp("hub") / "model", "sd1")
    for name in (
        "README.md",
        "v1.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/flax_model.msgpack",
        "unet/model.onnx",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be read")
    return folder


def test_what_is_downloaded(model, tmp_path):
    """Configurations, tokenizer and one copy of the weights; the second time nothing; later without the hub."""
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    half = make(tmp_path / "half", "sd1", dtype=torch.float16)
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        (half / part / f"{name}.safetensors").rename(half / part / f"{name}.fp16.safetensors")
    with serving(Hub()) as hub:
        commits = [hub.add("org/model", model), hub.add("org/model", half, "refs/pr/1")]
        first, again = download([("org/model", None)] * 2, hub.url, tmp_path)
        assert hub.downloaded() == SETTINGS | weights
        assert Path(first["folder"]).name == commits[0]
        assert first["told"] == ["downloading org/model: 8 files, 0.0 GB", "reading org/model"]
        assert again == {"folder": first["folder"], "told": []}
        other = download([("org/model", "refs/pr/1"), ("org/model", commits[1])], hub.url, tmp_path)
        assert [Path(result["folder"]).name for result in other] == [commits[1]] * 2
        assert "unet/diffusion_pytorch_model.fp16.safetensors" in hub.downloaded()
        calls = len(hub.log)
        (offline,) = download([("org/model", None)], hub.url, tmp_path, HF_HUB_OFFLINE="1")
        assert (offline["folder"], len(hub.log)) == (first["folder"], calls)
        assert offline["told"] == [f"the hub is offline: taking org/model from the cache, commit {commits[0]}"]
    unreachable = download([("org/model", None), ("org/model", "refs/pr/1")], hub.url, tmp_path)
    assert [Path(result["folder"]).name for result in unreachable] == commits
    assert "does not give it" in unreachable[0]["told"][0]


def test_refused(model, tmp_path):
    """One sentence each, before weights are downloaded; a family is told by its class."""
    pickled = shutil.copytree(model, tmp_path / "pickled")
    for path in pickled.glob("unet/*.safetensors"):
        path.unlink()
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "model_index.json").write_text('{"_class_name": "FluxFillPipeline"}')
    (tmp_path / "flux" / "ae.safetensors").touch()
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "v1.safetensors").touch()
    with serving(Hub(gated={"org/gated"})) as hub:
        hub.add("org/pickled", pickled)
        hub.add("org/flux", tmp_path / "flux")
        hub.add("org/single", tmp_path / "single")
        hub.add("org/gated", model)
        models = ("org/pickled", "org/flux", "org/single", "org/absent", "org/--bad..name")
        results = download([*((name, None) for name in models), ("org/pickled", "v9")], hub.url, tmp_path)
        assert hub.downloaded() == {"model_index.json"}
        (gated,) = download([("org/gated", None)], hub.url, tmp_path)
        (offline,) = download([("org/gated", None)], hub.url, tmp_path, HF_HUB_OFFLINE="1")
    (unreachable,) = download([("org/single", None)], hub.url, tmp_path)
    for result, words in zip(
        [*results, gated, offline, unreachable],
        [
            "org/pickled holds its unet only as unet/diffusion_pytorch_model.bin, which is a pickle",
            "org/flux is a FluxFillPipeline, as its model_index.json says: memedge exports Stable Diffusion",
            "holds no unet folder, so it is not a diffusers-format model: if v1.safetensors is a whole checkpoint",
            "There is no org/absent, neither here nor on the hub",
            "There is no org/--bad..name",
            "org/pickled has no revision v9",
            "org/gated is gated: accept its terms",
            "org/gated is not in the cache and HF_HUB_OFFLINE is set",
            "org/single is not in the cache and the hub cannot be reached",
        ],
        strict=True,
    ):
        assert words in result["error"]


@pytest.mark.slow
def test_incomplete_cache(model, tmp_path):
    """A download that was cut off is not half a model when there is no network."""
    with serving(Hub()) as hub:
        hub.add("org/model", model)
        (first,) = download([("org/model", None)], hub.url, tmp_path)
    (Path(first["folder"]) / "text_encoder/model.safetensors").unlink()
    script = """
import sys
from memedge.engine.errors import ExportError
from memedge.export.sources.open import load_parts
try:
    load_parts(sys.argv[1], revision=None, loras=[], allow_pickle=False, config=None, progress=print)
except ExportError as error:
    print(error)
"""
    done = run(["-c", script, "org/model"], hub.url, tmp_path, HF_HUB_OFFLINE="1")
    assert "holds no weights of text_encoder" in done.stdout, done.stderr


@pytest.mark.slow
def test_load(model, tmp_path):
    """The modules are those of the folder; the commit is in the id."""
    script = """
import sys
from memedge.export.quiet_libraries import quiet
from memedge.export.sources.open import load_parts
options = {"revision": None, "loras": [], "allow_pickle": False, "config": None, "progress": print}
with quiet():
    parts, same = (load_parts(source, **options) for source in sys.argv[1:])
assert parts.sha256 == same.sha256
for one, other in zip([parts.denoiser, *parts.text_encoders], [same.denoiser, *same.text_encoders]):
    assert all(tensor.equal(other.state_dict()[name]) for name, tensor in one.state_dict().items())
print(parts.id)
"""
    with serving(Hub()) as hub:
        commit = hub.add("org/model", model)
        done = run(["-c", script, "org/model", model], hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"org/model@{commit}"
    assert not done.stderr
