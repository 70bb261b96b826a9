"""`memedge triton`, the model that it writes, and both in a real tritonserver."""

import contextlib
import importlib
import json
import logging
import queue
import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from command_line import fails, memedge
from triton_process import tritonserver

from memedge import Detector
from memedge.embedded import EMBEDDED_ENGINE, captions
from memedge.engine.errors import InputError, NotFiniteError, ProviderError
from memedge.integrations.triton_repository import write_repository
from memedge.protocol import OUTPUTS

PROMPTS = [caption.prompt for caption in captions()[:16]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of the embedded engine on the CPU."""
    path = tmp_path_factory.mktemp("triton") / "models"
    assert memedge("triton", "-o", path, "--provider", "cpu").returncode == 0
    return path


def calibrated_for(key: str, folder: Path) -> Path:
    """Return a copy of the embedded engine that says it is calibrated for another provider."""
    copy = shutil.copytree(EMBEDDED_ENGINE, folder / key)
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"openvino-fp32"', f'"{key}"'))
    return copy


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# What is written


def test_repository(repository):
    """One version with the engine's own files, three lines of Python, and the whole configuration."""
    files = everything(repository)
    engine = {name for name in files if "/engine/" in name}
    assert files - engine == {"memedge/config.pbtxt", "memedge/1/model.py"}
    names = json.loads((EMBEDDED_ENGINE / "manifest.json").read_text())["files"]
    assert {Path(name).name for name in engine} == {"manifest.json", *names}
    assert len((repository / "memedge/1/model.py").read_text().splitlines()) == 3
    config = (repository / "memedge/config.pbtxt").read_text()
    assert all(f'name: "{name}" data_type: TYPE_' in config for name in OUTPUTS)
    for words in (
        'input [ { name: "prompt" data_type: TYPE_STRING dims: [ 1 ] } ]',
        "max_batch_size: 64",
        "KIND_CPU",
        "timeout_action: REJECT",
        "max_queue_size: 1024",
        'key: "provider" value { string_value: "cpu" }',
    ):
        assert words in config
    assert "max_queue_delay" not in config


def test_says_what_it_wrote(tmp_path):
    done = memedge("triton", EMBEDDED_ENGINE, "-o", tmp_path / "a", "--provider", "openvino", "--precision", "fp32")
    assert "model memedge, openvino, fp32, batches of up to 64 prompts" in done.stderr
    done = memedge("triton", "-o", tmp_path / "b", "--provider", "cpu", "--early", "conformal", "--json")
    assert json.loads(done.stdout) == {
        "path": str(tmp_path / "b"),
        "model": "memedge",
        "provider": "cpu",
        "precision": None,
        "runs_on": "cpu",
        "max_batch_size": 64,
    }
    assert '"early" value { string_value: "conformal" }' in (tmp_path / "b/memedge/config.pbtxt").read_text()


def test_auto_is_what_runs_here(tmp_path):
    """By its name: another machine does not run something else."""
    made = write_repository(EMBEDDED_ENGINE, tmp_path / "models")
    info = Detector.load().info
    assert (made.provider, made.precision) == (info.provider, info.precision)


def test_a_provider_that_is_not_here(tmp_path):
    """Written on one machine, served on another: an instance on the first GPU, and the plans that were built."""
    engine = calibrated_for("tensorrt-rtx-fp32", tmp_path)
    (engine / "plans").mkdir()
    (engine / "plans/manifest.json").write_text("{}")
    made = write_repository(engine, tmp_path / "models", "tensorrt-rtx")
    assert (made.runs_on, made.precision) == ("gpu", None)
    model = tmp_path / "models/memedge"
    assert "count: 1 kind: KIND_GPU gpus: [ 0 ]" in (model / "config.pbtxt").read_text()
    assert (model / "1/engine/plans/manifest.json").is_file()
    with pytest.raises(InputError, match="is not calibrated for tensorrt,"):
        write_repository(engine, tmp_path / "other", "tensorrt")


def test_into_a_repository_with_other_models(tmp_path):
    (tmp_path / "models/other").mkdir(parents=True)
    write_repository(EMBEDDED_ENGINE, tmp_path / "models", "cpu")
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"other", "memedge"}


def test_what_cannot_be_written(engine, repository, tmp_path):
    before = everything(repository)
    for arguments, words in [
        (("-o", repository), f"{repository / 'memedge'} is there already: remove it, or name another repository."),
        (("-o", tmp_path / "absent/models"), "does not exist"),
        ((engine, "-o", tmp_path / "new"), "is not calibrated for cpu"),
        (("-o", tmp_path / "new", "--provider", "cpu", "--precision", "fp16"), "is not calibrated for cpu-fp16"),
        (("-o", tmp_path / "new", "--provider", "cuda"), "is not calibrated for cuda"),
        (("-o", tmp_path / "new", "--provider", "abacus"), "no provider 'abacus'"),
        ((tmp_path, "-o", tmp_path / "new"), "holds no manifest.json"),
        ((engine, "--engine", engine, "-o", tmp_path / "new"), "Two engine directories"),
    ]:
        fails(memedge("triton", *arguments), words)
    assert everything(repository) == before
    assert list(tmp_path.iterdir()) == []


def test_no_conformal_interval(tmp_path):
    copy = shutil.copytree(EMBEDDED_ENGINE, tmp_path / "engine")
    manifest = json.loads((copy / "manifest.json").read_text())
    for calibration in manifest["calibrations"].values():
        calibration["conformal"] = None
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = memedge("triton", copy, "-o", tmp_path / "models", "--early", "conformal", "--provider", "cpu")
    fails(done, "stores no conformal interval for cpu")


def test_nothing_is_left_of_a_copy_that_fails(tmp_path, monkeypatch):
    def full(_source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", full)
    fails(memedge("triton", "-o", tmp_path / "models", "--provider", "cpu"), "No space left on device")
    assert list(tmp_path.iterdir()) == []


# The model, with a stand-in for Triton's module


class Tensor(SimpleNamespace):
    def __init__(self, name: str, array: Any):
        super().__init__(name=name, array=array)

    def as_numpy(self) -> Any:
        return self.array


class TritonError(SimpleNamespace):
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str = INTERNAL):
        super().__init__(message=message, code=code)


class Response(SimpleNamespace):
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None):
        super().__init__(outputs={one.name: one.array for one in output_tensors or []}, error=error)


@pytest.fixture(scope="module")
def module():
    """memedge.integrations.triton as it is within Triton."""
    stand_in = ModuleType("triton_python_backend_utils")
    found = {"Tensor": Tensor, "TritonError": TritonError, "InferenceResponse": Response}
    vars(stand_in).update(found, get_input_tensor_by_name=lambda request, name: request[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, stand_in.__name__, stand_in)
        yield importlib.import_module("memedge.integrations.triton")
        del sys.modules["memedge.integrations.triton"]


def arguments(repository: Path, device: str = "0", kind: str = "CPU", **parameters: str) -> dict[str, str]:
    """Return what Triton tells an instance."""
    values = {"provider": "cpu", "early": "proven"} | parameters
    config = {
        "max_batch_size": 4,
        "parameters": {name: {"string_value": value} for name, value in values.items()},
    }
    return {
        "model_config": json.dumps(config),
        "model_repository": str(repository / "memedge"),
        "model_version": "1",
        "model_instance_kind": kind,
        "model_instance_device_id": device,
    }


@pytest.fixture(scope="module")
def model(module, repository):
    model = module.TritonPythonModel()
    model.initialize(arguments(repository))
    return model


def request(*prompts: str | bytes) -> dict[str, Tensor]:
    raw = [[one if isinstance(one, bytes) else one.encode()] for one in prompts]
    return {"prompt": Tensor("prompt", np.array(raw, dtype=object))}


def test_one_call_for_all_requests(model, detector, monkeypatch):
    calls = []
    detect = model._detector.detect
    monkeypatch.setattr(model._detector, "detect", lambda prompts, early: calls.append(1) or detect(prompts, early))
    found = model.execute([request(*PROMPTS[:3]), request(PROMPTS[3]), request(*PROMPTS[4:6])])
    assert len(calls) == 1
    expected = detector.detect(PROMPTS[:6])
    for response, verdicts in zip(found, (expected[:3], expected[3:4], expected[4:]), strict=True):
        assert response.error is None
        assert list(response.outputs) == list(OUTPUTS)
        assert all(array.shape == (len(verdicts), 1) for array in response.outputs.values())
        assert response.outputs["memorized"].dtype == bool
        assert response.outputs["memorized"].ravel().tolist() == [one.memorized for one in verdicts]
        assert response.outputs["norm"].ravel() == pytest.approx([one.norm for one in verdicts], rel=1e-4)
        assert response.outputs["passes"].dtype == np.float64


def test_a_bad_request_fails_alone(model, module):
    many = module.MOST_BYTES // 4
    found = model.execute([request("a star", b"\xff\xfe"), request("a star"), request(*["a" * many] * 5)])
    assert found[0].error.message == "Prompt 2 is not valid UTF-8: correct or remove it."
    assert found[1].error is None and found[1].outputs["memorized"].tolist() == [[False]]
    assert found[2].error.message == f"The prompts have {5 * many} bytes: give at most {4 * many} in a request."
    assert {found[0].error.code, found[2].error.code} == {"invalid"}
    assert model.execute([request(b"\xff")])[0].error is not None


def test_a_prompt_that_breaks_the_model_fails_alone(model, monkeypatch, caplog):
    """NaN, or what no one expected: the others of its batch get their verdicts."""
    detect = model._detector.detect

    def breaking(prompts: Any, early: str) -> Any:
        texts = list(prompts)
        if "nan" in texts:
            raise NotFiniteError("The UNet gave NaN.")
        if "bug" in texts:
            raise ZeroDivisionError
        return detect(texts, early)

    monkeypatch.setattr(model._detector, "detect", breaking)
    with caplog.at_level(logging.ERROR):
        found = model.execute([request("a star"), request("nan"), request("bug", "a moon"), request("a moon")])
    assert [one.error and one.error.code for one in found] == [None, "internal", "internal", None]
    assert found[1].error.message == "The UNet gave NaN."
    assert found[2].error.message.startswith("The prompt could not be judged (ZeroDivisionError): ")
    assert "ZeroDivisionError" in caplog.text and "a moon" not in caplog.text


def test_what_the_model_does_not_open(module, engine, repository, tmp_path):
    """An engine without a calibration for what runs it, a GPU that is not the first, another `early`."""
    (tmp_path / "memedge/1").mkdir(parents=True)
    shutil.copytree(engine, tmp_path / "memedge/1/engine")
    for told, kind, words in [
        (arguments(tmp_path), InputError, "is not calibrated for cpu-fp32"),
        (arguments(repository, device="1", kind="GPU"), ProviderError, "this instance is for GPU 1: write"),
        (arguments(repository, provider="abacus"), ProviderError, "no provider 'abacus'"),
        (arguments(repository, early="perhaps"), InputError, "There is no early='perhaps'"),
    ]:
        with pytest.raises(kind, match=re.escape(words)):
            module.TritonPythonModel().initialize(told)


def test_an_instance_ends(module, repository):
    model = module.TritonPythonModel()
    model.initialize(arguments(repository, precision="fp32", early="off"))
    assert model.execute([request("a star")])[0].outputs["passes"].tolist() == [[2]]
    model.finalize()
    assert vars(model).keys() == {"_early"}


# In a real tritonserver

WAITING = 40  # requests that wait, in the server that is tested


@pytest.fixture(scope="module")
def triton(repository, triton_environment, tmp_path_factory):
    """A tritonserver with a short queue."""
    folder = tmp_path_factory.mktemp("tritonserver")
    models = shutil.copytree(repository, folder / "models")
    config = models / "memedge/config.pbtxt"
    config.write_text(config.read_text().replace("max_queue_size: 1024", f"max_queue_size: {WAITING}"))
    (folder / "server").mkdir()
    with tritonserver(triton_environment, models, folder / "server") as triton:
        assert triton.process.poll() is None, triton.said()
        yield triton


def tensor(client: ModuleType, *prompts: str | bytes) -> list[Any]:
    given = client.InferInput("prompt", [len(prompts), 1], "BYTES")
    given.set_data_from_numpy(request(*prompts)["prompt"].array)
    return [given]


@pytest.fixture(params=["http", "grpc"])
def asked(request, triton):
    """The module of one of tritonclient's clients, and the client."""
    client = importlib.import_module(f"tritonclient.{request.param}")
    with contextlib.closing(client.InferenceServerClient(getattr(triton, request.param))) as caller:
        yield client, caller


@pytest.mark.slow
def test_triton_has_no_complaint(triton):
    """Neither about the configuration nor about the model; this machine's GPUs are no matter."""
    about_gpus = ("pinned_memory_manager", "CudaDriverHelper", "DCGM", "NVML", "metrics.cc")
    lines = [line for line in triton.said().splitlines() if re.match(r"[WE]\d{4} ", line)]
    assert [line for line in lines if not any(word in line for word in about_gpus)] == []


@pytest.mark.slow
def test_triton_is_ready(asked):
    client, caller = asked
    assert caller.is_server_live() and caller.is_server_ready() and caller.is_model_ready("memedge")
    told = caller.get_model_metadata("memedge", **({"as_json": True} if "grpc" in client.__name__ else {}))
    assert [(one["name"], one["datatype"]) for one in told["outputs"]] == [
        (name, kind) for name, (kind, _, _) in OUTPUTS.items()
    ]


@pytest.mark.slow
def test_triton_gives_the_detectors_verdicts(asked, detector):
    client, caller = asked
    found = caller.infer("memedge", tensor(client, *PROMPTS))
    expected = detector.detect(PROMPTS)
    for name, (kind, _, field) in OUTPUTS.items():
        values, wanted = found.as_numpy(name).ravel().tolist(), [field(one) for one in expected]
        if kind == "FP64":
            assert values == pytest.approx(wanted, rel=1e-4, abs=1e-6, nan_ok=True)
        elif name == "reason":
            assert [value.decode() for value in values] == wanted
        else:
            assert values == wanted


@pytest.mark.slow
def test_triton_refuses_a_bad_request_alone(asked):
    from tritonclient.utils import InferenceServerException

    client, caller = asked
    for bad, words in [
        ((b"\xff",), "Prompt 1 is not valid UTF-8: correct or remove it."),
        (("a" * (1 << 21),), "give at most 1048576 in a request."),
        (("a star",) * 65, "batch-size must be <= 64"),
    ]:
        with pytest.raises(InferenceServerException, match=re.escape(words)):
            caller.infer("memedge", tensor(client, *bad))
        assert caller.infer("memedge", tensor(client, "a star")).as_numpy("memorized").tolist() == [[False]]


@pytest.mark.slow
def test_triton_batches_concurrent_clients(triton, detector):
    """Its own metrics show it: fewer executions than prompts, each of which came alone. Verdicts are not mixed up."""
    from tritonclient import grpc

    prompts = [caption.prompt for caption in captions()[:160]]
    names = ("nv_inference_exec_count", "nv_inference_count", "nv_inference_request_success")
    before = [triton.count(name) for name in names]

    def ask(part: list[str]) -> list[tuple[bool, float]]:
        with grpc.InferenceServerClient(triton.grpc) as caller:
            found = [caller.infer("memedge", tensor(grpc, one)) for one in part]
        return [(one.as_numpy("memorized").item(), one.as_numpy("norm").item()) for one in found]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, [prompts[place::16] for place in range(16)]))
    executions, inferences, requests = (triton.count(name) - old for name, old in zip(names, before, strict=True))
    assert inferences == requests == len(prompts)
    assert executions < inferences / 2
    for place, answers in enumerate(found):
        expected = detector.detect(prompts[place::16])
        assert [one for one, _ in answers] == [one.memorized for one in expected]
        assert [norm for _, norm in answers] == pytest.approx([one.norm for one in expected], rel=1e-4)


@pytest.mark.slow
def test_triton_refuses_what_its_queue_does_not_hold(triton):
    """At once, and what waits longer than its own timeout; all others get a verdict, and then it is as before."""
    from tritonclient import grpc

    answers: queue.Queue[Exception | None] = queue.Queue()
    before = triton.count("nv_inference_request_failure", "REJECTED")

    def ask(count: int, timeout: int | None = None) -> list[str]:
        """Send requests of 8 prompts at once; return the errors."""
        for place in range(count):
            given = tensor(grpc, *[f"{place} {one}" for one in range(8)])
            caller.async_infer("memedge", given, lambda error, **_: answers.put(error), timeout=timeout)
        return [str(error) for _ in range(count) if (error := answers.get(timeout=120))]

    with grpc.InferenceServerClient(triton.grpc) as caller:
        full = ask(10 * WAITING)
        assert len(full) < 10 * WAITING
        assert any("Exceeds maximum queue size" in one for one in full)
        late = ask(WAITING, timeout=1000)  # microseconds
        assert late and all("timeout" in one.lower() for one in late)
        assert caller.infer("memedge", tensor(grpc, "a star")).as_numpy("memorized").item() is False
    waited = [one for one in (*full, *late) if "timeout" in one.lower()]
    assert triton.count("nv_inference_request_failure", "REJECTED") - before == len(waited)


@pytest.mark.slow
def test_triton_ends(triton):
    """The last test of this server."""
    triton.process.send_signal(signal.SIGTERM)
    assert triton.process.wait(60) == 0
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{triton.http}/v2/health/live", trust_env=False)
