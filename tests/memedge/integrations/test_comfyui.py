"""The nodes of ComfyUI, on a stand-in; on the real one where MEMEDGE_COMFYUI names its folder (CONTRIBUTING.md)."""

import asyncio
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import comfyui
import numpy as np
import pytest
import torch

from memedge import InputError, guidance_stats
from memedge.integrations import comfyui as package
from memedge.monitor.map import smoothed

from comfy.model_management import InterruptProcessingException  # isort: skip
from comfy.model_sampling import X0, ModelSamplingDiscrete  # isort: skip
from comfy.sample import sample  # isort: skip
from comfy.samplers import CFGGuider  # isort: skip

from memedge.integrations.comfyui.gate import Gate  # isort: skip
from memedge.integrations.comfyui.nodes import MemorizationGate, MemorizationReport, MemorizationScore  # isort: skip

MEMORIZED, CLEAN = "the left luggage sign", "a red bicycle"
CFG, STEPS = 4.0, 4
FOLDER = Path(package.__file__).parent
API = FOLDER / "example_workflows/api/memorization_gate.json"
real = pytest.mark.skipif(not comfyui.REAL, reason="MEMEDGE_COMFYUI does not name ComfyUI's folder")


@pytest.fixture(scope="module")
def model():
    return comfyui.model()


@pytest.fixture(scope="module")
def conds():
    return {prompt: comfyui.conditioning(prompt) for prompt in (MEMORIZED, CLEAN, "")}


def noise(rows=2, seed=0):
    return torch.randn(rows, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def generate(model, positive, negative, x=None, cfg=CFG, sampler="euler", **options):
    x = noise() if x is None else x
    image = torch.zeros_like(x)
    return sample(model, x, STEPS, cfg, sampler, "simple", positive, negative, image, disable_pbar=True, **options)


def predicted(model, cond, x, t):
    with torch.no_grad():
        return model.model.diffusion_model.unet(x, t, cond[0][0].expand(len(x), -1, -1)).sample


def first_norm(model, positive, negative, x, t=999, **options):
    """Return the norm of the UNet's own predictions on the noise itself, which is x_t of the first step."""
    return guidance_stats(predicted(model, positive, x, t), predicted(model, negative, x, t), **options).norm


def rows_of(model, run):
    """Return how many rows the UNet computes within `run`."""
    unet = model.model.diffusion_model
    before = unet.calls
    run()
    return unet.calls - before


def test_norm_is_that_of_the_unets_own_predictions(model, conds):
    """And the samples are those of the bare model, bit by bit, for as many rows of the UNet."""
    gate = Gate(None, "flag")
    for prompt in (MEMORIZED, CLEAN):
        bare = generate(model, conds[prompt], conds[""])
        samples = generate(gate.patch(model), conds[prompt], conds[""])
        assert torch.equal(samples, bare)
        run = gate.run_of(samples)
        np.testing.assert_allclose(run.norm, first_norm(model, conds[prompt], conds[""], noise()), rtol=1e-4)
        assert run.memorized is None
        assert all(re.fullmatch(r"no verdict: norm [\d.]+ at t 999, no threshold", reason) for reason in run.reasons())
    patched = gate.patch(model)
    assert rows_of(model, lambda: generate(patched, conds[CLEAN], conds[""])) == 2 * 2 * STEPS


@pytest.mark.parametrize("kind", ["V_PREDICTION", "FLOW"])
def test_norm_of_other_models_is_that_of_their_own_predictions(conds, kind):
    """The UNet's output taken for v, or for a flow's velocity, whose norm is that of Δv as it is."""
    model, gate = comfyui.model(kind), Gate(None, "flag")
    samples = generate(gate.patch(model), conds[MEMORIZED], conds[""])
    sigma = float(model.get_model_object("model_sampling").sigmas[-1])
    v = {"prediction_type": "v_prediction", "alpha_cumprod": 1 / (1 + sigma**2)}
    options = v if kind == "V_PREDICTION" else {"t": 1000}  # a flow's time is 1000 σ
    expected = first_norm(model, conds[MEMORIZED], conds[""], noise(), **options)
    np.testing.assert_allclose(gate.run_of(samples).norm, expected, rtol=2e-4)


def test_a_run_is_interrupted_after_its_first_step_if_all_its_images_are_memorized(model, conds):
    lower, higher = sorted(first_norm(model, conds[MEMORIZED], conds[""], noise()))
    for threshold, steps in ((0.9 * lower, 1), ((lower + higher) / 2, STEPS)):
        patched = Gate(threshold, "interrupt").patch(model)

        def run(patched=patched, steps=steps):
            if steps == STEPS:
                generate(patched, conds[MEMORIZED], conds[""])
            else:
                with pytest.raises(InterruptProcessingException):
                    generate(patched, conds[MEMORIZED], conds[""])

        assert rows_of(model, run) == 2 * 2 * steps


@pytest.mark.parametrize("negative", ["", CLEAN])
def test_guidance_of_memorized_images_is_opposite_until_timestep_650(model, conds, negative):
    """As a function for guidance in the bare model makes it; an image that is not memorized stays as it was."""
    norms = first_norm(model, conds[MEMORIZED], conds[""], noise())
    gate = Gate(norms.mean(), "steer", conds[""] if negative else None)
    samples = generate(gate.patch(model), conds[MEMORIZED], conds[negative])
    run = gate.run_of(samples)
    np.testing.assert_array_equal(run.memorized, norms > norms.mean())
    (flagged,) = np.flatnonzero(run.memorized)
    assert run.reasons()[flagged].endswith(", steered until t ≤ 650")
    assert run.reasons()[1 - flagged].startswith("ok: norm ")

    def opposite(args):
        x, sigma = args["input"], args["sigma"][:1]
        t = model.get_model_object("model_sampling").timestep(sigma)
        times.append(int(t))
        if t <= 650:
            return x - args["uncond_denoised"] - CFG * (args["cond_denoised"] - args["uncond_denoised"])
        empty = x - sigma * predicted(model, conds[""], x / (1 + sigma**2) ** 0.5, t)
        return x - empty + 2 * (args["cond_denoised"] - empty)

    times = []
    bare = generate(model, conds[MEMORIZED], conds[negative])
    reference = model.clone()
    reference.set_model_sampler_cfg_function(opposite)
    steered = generate(reference, conds[MEMORIZED], conds[negative])
    assert times == [999, 749, 499, 249]
    assert torch.equal(samples[1 - flagged], bare[1 - flagged])
    torch.testing.assert_close(samples[flagged], steered[flagged], rtol=1e-3, atol=1e-3)
    assert (steered - bare)[flagged].abs().max() > 0.1


def test_a_run_that_begins_late_cannot_be_steered(model, conds):
    """It is interrupted if all its images are memorized, as a guard blocks them; else its report says so."""
    with pytest.raises(InterruptProcessingException):
        generate(Gate(1e-3, "steer").patch(model), conds[CLEAN], conds[""], denoise=0.5)
    measuring = Gate(None, "flag")
    norm = measuring.run_of(generate(measuring.patch(model), conds[CLEAN], conds[""], denoise=0.5)).norm
    gate = Gate(norm.mean(), "steer")
    run = gate.run_of(generate(gate.patch(model), conds[CLEAN], conds[""], denoise=0.5))
    assert run.reasons()[norm.argmax()].endswith(", not steered, as the run begins at t ≤ 650")
    assert run.reasons()[norm.argmin()].startswith("ok: norm ")


def test_a_negative_prompt_does_not_hide_the_prompt(model, conds):
    """Its norm is against the empty prompt where that is given, for one more half of the first step."""
    gate = Gate(None, "flag", conds[""])
    patched, kept = gate.patch(model), []
    rows = rows_of(model, lambda: kept.append(generate(patched, conds[MEMORIZED], conds[MEMORIZED])))
    assert rows == 2 * 2 * STEPS + 2
    expected = first_norm(model, conds[MEMORIZED], conds[""], noise())
    np.testing.assert_allclose(gate.run_of(kept[0]).norm, expected, rtol=1e-4)
    assert torch.equal(kept[0], generate(model, conds[MEMORIZED], conds[MEMORIZED]))


def test_samplers_of_a_higher_order_have_as_many_steps(model, conds):
    gate = Gate(None, "flag")
    samples = generate(gate.patch(model), conds[CLEAN], conds[""], sampler="heun")
    assert gate.run_of(samples).steps == STEPS


def test_a_report_is_of_the_run_that_made_its_latents(model, conds):
    """Also if another run came after it, and if the model was cloned since, as each further patch does."""
    gate = Gate(None, "flag")
    patched = gate.patch(model).clone()
    first = generate(patched, conds[MEMORIZED], conds[""])
    second = generate(patched, conds[CLEAN], conds[""])
    assert (gate.run_of(first).norm > gate.run_of(second).norm).all()
    assert gate.run_of(first.half()) is gate.run_of(first)
    with pytest.raises(InputError, match="none of the last runs"):
        gate.run_of(first + 1)


def test_what_is_not_known_is_refused(model, conds):
    gate = Gate(None, "flag")
    with pytest.raises(InputError, match="At cfg 1 "):
        generate(gate.patch(model), conds[CLEAN], conds[""], cfg=1.0)
    with pytest.raises(InputError, match="To steer runs the gate needs a threshold"):
        Gate(None, "steer")
    with pytest.raises(InputError, match="models of noise with 1000 training timesteps"):
        generate(Gate(1.0, "steer").patch(comfyui.model("FLOW")), conds[CLEAN], conds[""])
    with pytest.raises(InputError, match="At cfg 0 "):
        generate(Gate(1e-3, "steer").patch(model), conds[CLEAN], conds[""], cfg=0.0)
    other = model.clone()
    other.add_object_patch("model_sampling", type("Other", (ModelSamplingDiscrete, X0), {})())
    with pytest.raises(InputError, match="predicts neither noise, nor v"):
        generate(gate.patch(other), conds[CLEAN], conds[""])


def test_guiders_without_the_hook_are_refused(model, conds):
    class Guider(CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):  # noqa: ARG002
            return x

    guider = Guider(Gate(None, "flag").patch(model))
    guider.set_conds(conds[CLEAN], conds[""])

    class Sampler:
        def sample(self, *_args):
            return noise()

        __call__ = sample

    with pytest.raises(InputError, match="does not give the model's two predictions"):
        guider.sample(noise(), torch.zeros(2, 4, 16, 16), Sampler(), torch.tensor([1.0, 0.0]), disable_pbar=True)


def test_report_has_score_verdict_and_map(model, conds):
    patched, gate = MemorizationGate.execute(model, threshold=2.4, action="flag").result
    latents = generate(patched, conds[MEMORIZED], conds[""])
    image = torch.rand(2, 64, 64, 3)
    report = MemorizationReport.execute(gate, {"samples": latents}, image)
    score, memorized, verdict, shown, mask = report.result
    run = gate.run_of(latents)
    assert score == run.norm.max()
    assert memorized is bool((run.norm >= 2.4).any())
    assert report.ui.as_dict() == {"text": (verdict,)}
    assert len(verdict.splitlines()) == 2
    assert (shown.shape, mask.shape) == (image.shape, image.shape[:3])
    assert mask.dtype == torch.float32
    assert 0 <= mask.min() <= mask.max() == 1
    place = (mask == 1).nonzero()[0].tolist()
    assert shown[*place].tolist() == [1, 0, 0]  # red where it pulls most
    alone = MemorizationReport.execute(gate, {"samples": latents}).result
    assert alone[3].shape == (2, 128, 128, 3)
    delta = predicted(model, conds[MEMORIZED], noise(), 999) - predicted(model, conds[""], noise(), 999)
    first = smoothed(delta.square().sum(1).numpy())
    np.testing.assert_allclose(run.map(16, 16), first / first.max(), atol=1e-3)
    with pytest.raises(InputError, match="1 images for 2 latents"):
        MemorizationReport.execute(gate, {"samples": latents}, image[:1])


def test_score_is_the_detectors(detector, tmp_path):
    node = MemorizationScore.execute(MEMORIZED, "embedded")
    score, norm, memorized, text = node.result
    (verdict,) = detector.detect([MEMORIZED], early="off")
    assert (memorized, text) == (True, f"memorized: {verdict.reason}")
    np.testing.assert_allclose((score, norm), (verdict.score, verdict.norm), rtol=1e-5)
    assert MemorizationScore.fingerprint_inputs("", "embedded") != MemorizationScore.fingerprint_inputs("", "none")
    with pytest.raises(Exception, match="is not a directory"):
        MemorizationScore.execute(MEMORIZED, str(tmp_path / "none"))


def schemas():
    extension = asyncio.run(package.comfy_entrypoint())
    return {
        schema.node_id: schema for schema in (node.define_schema() for node in asyncio.run(extension.get_node_list()))
    }


def test_workflow_fits_the_nodes():
    nodes, found = json.loads(API.read_text()), schemas()
    ours = {name: node for name, node in nodes.items() if node["class_type"] in found}
    assert {node["class_type"] for node in ours.values()} == found.keys() - {"MemedgeMemorizationScore"}
    for node in nodes.values():
        if schema := found.get(node["class_type"]):
            assert set(node["inputs"]) <= {put.id for put in schema.inputs}
        for link in node["inputs"].values():
            if isinstance(link, list) and (schema := found.get(nodes[link[0]]["class_type"])):
                assert link[1] < len(schema.outputs)


def test_the_workflow_for_the_canvas_is_the_same():
    """Its nodes, their links and their widgets' values, by each input's name."""
    api = json.loads(API.read_text())
    canvas = json.loads((FOLDER / "example_workflows/memorization_gate.json").read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in canvas["links"]}
    assert {str(node["id"]): node["type"] for node in canvas["nodes"]} == {
        n: one["class_type"] for n, one in api.items()
    }
    for node in canvas["nodes"]:
        widgets = iter(node.get("widgets_values", []))
        found = {}
        for put in node["inputs"]:
            if "widget" in put:
                found[put["name"]] = next(widgets)
                if put["name"] == "seed":
                    assert next(widgets) == "fixed"  # what the canvas does with it after each run
            elif put["link"] is not None:
                found[put["name"]] = links[put["link"]]
        assert found == api[str(node["id"])]["inputs"], node["type"]


@real
def test_the_workflow_runs_in_the_real_comfyui(tmp_path, model, conds):
    """By its own executor, from the package's folder in custom_nodes; only the loader is ours."""
    import execution
    import folder_paths
    import nodes

    folder_paths.set_output_directory(str(tmp_path))
    folder_paths.set_temp_directory(str(tmp_path))
    custom = tmp_path / "custom_nodes"
    custom.mkdir()
    (custom / "memorization_gate").symlink_to(FOLDER)
    extras = Path(nodes.__file__).parent / "comfy_extras"
    for path in (custom / "memorization_gate", comfyui.LOADER, extras / "nodes_preview_any.py"):
        assert asyncio.run(nodes.load_custom_node(str(path)))
    workflow = json.loads(API.read_text())
    workflow["1"] = {"class_type": "EmojiLoader", "inputs": {}}
    workflow["5"]["inputs"] |= {"width": 128, "height": 128, "batch_size": 2}
    workflow["6"]["inputs"]["threshold"] = 1.0
    workflow["7"]["inputs"] |= {"steps": STEPS, "cfg": CFG, "scheduler": "simple"}

    def run():
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", workflow, None))
        assert valid, (error, node_errors)
        server = SimpleNamespace(client_id=None, last_node_id=None, last_prompt_id=None, send_sync=lambda *_: None)
        executor = execution.PromptExecutor(server)
        executor.execute(workflow, "id", {}, outputs)
        return executor

    done = run()
    assert done.success
    verdicts = done.history_result["outputs"]["9"]["text"][0].splitlines()
    x = torch.randn(2, 4, 16, 16, generator=torch.manual_seed(0))
    norms = first_norm(model, conds[MEMORIZED], conds[""], x)
    assert verdicts == [f"memorized: norm {norm:.4g} at t 999 ≥ threshold 1" for norm in norms]
    assert len(list(tmp_path.glob("memedge_*.png"))) == 2

    workflow["6"]["inputs"]["action"] = "interrupt"
    assert not (stopped := run()).success
    assert [name for name, _ in stopped.status_messages][-1] == "execution_interrupted"
    assert len(list(tmp_path.glob("memedge_*.png"))) == 2  # no image was made


def test_metadata_is_as_the_registry_wants_it():
    found = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    name = found["project"]["name"]
    assert len(name) < 100
    assert "comfyui" not in name.lower()
    assert re.fullmatch(r"[A-Za-z]+(-[A-Za-z0-9]+)*", name)
    assert re.fullmatch(r"\d+\.\d+\.\d+", found["project"]["version"])
    assert "Repository" in found["project"]["urls"]
    assert {"PublisherId", "DisplayName", "Icon"} <= found["tool"]["comfy"].keys()
    assert found["project"]["dependencies"] == (FOLDER / "requirements.txt").read_text().split() == ["memedge"]
