"""A model repository for NVIDIA Triton, written from an engine."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memedge.decision.early import Early, check_early
from memedge.decision.rule import Rule
from memedge.detector import PROMPTS_PER_BATCH
from memedge.engine import atomic, cache, plans
from memedge.engine.directory import EngineDirectory
from memedge.engine.engine import rows_per_call
from memedge.engine.errors import InputError
from memedge.engine.manifest import FILE_NAME
from memedge.engine.opening import automatic
from memedge.engine.places import check_new_folder
from memedge.engine.providers import find
from memedge.protocol import INPUT, NAME, OUTPUTS, VERSION

ENGINE = "engine"  # beside model.py
QUEUE, SECONDS = 1024, 10  # requests that may wait, and how long

MODEL = '''"""memedge as a model of Triton; the engine lies beside this file."""

from memedge.integrations.triton import TritonPythonModel
'''
# A batch is whatever waits when the last one is done: no delay is added to fill it.
CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: {most}
input [ {{ name: "{input}" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [
{outputs}
]
instance_group [ {{ {instances} }} ]
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {queue}
    timeout_action: REJECT
    default_timeout_microseconds: {microseconds}
    allow_timeout_override: true
  }}
}}
version_policy {{ latest {{ num_versions: 1 }} }}
{parameters}
"""
INSTANCES = {"cpu": "count: 1 kind: KIND_CPU", "gpu": "count: 1 kind: KIND_GPU gpus: [ 0 ]"}
TYPES = {"BOOL": "TYPE_BOOL", "BYTES": "TYPE_STRING", "FP64": "TYPE_FP64", "INT64": "TYPE_INT64"}


@dataclass(frozen=True)
class ModelRepository:
    """What was written.

    Attributes:
        path: the repository.
        model: the model's name.
        provider: what runs the engine.
        precision: of the UNet; None: the provider's best where it is served.
        runs_on: whether instances are for a GPU.
        max_batch_size: most prompts of a batch, and of a request.
    """

    path: Path
    model: str
    provider: str
    precision: str | None
    runs_on: Literal["cpu", "gpu"]
    max_batch_size: int


def write_repository(
    engine: Path, output: Path, provider: str = "auto", precision: str | None = None, early: Early = "proven"
) -> ModelRepository:
    """Write a model with a copy of the engine into a repository, all of it or nothing.

    Args:
        engine: the engine directory.
        output: the repository. It is made, or is there and has other models.
        provider: who will run the engine; "auto" is what it means here, and is written by its name. Another need not
            be installed here.
        precision: as in `Detector.load`.
        early: as in `Detector.detect`, for all requests.

    Raises:
        EngineError: the directory is no engine, or was damaged, or there is no such provider.
        InputError: the engine is not calibrated for it, or not for `early`; the output is in the way, or has no place.
    """
    place = output / NAME if output.is_dir() and any(output.iterdir()) else output
    check_new_folder(place, "name another repository")
    directory = EngineDirectory.open(engine)
    if provider == "auto":
        provider, precision = automatic(directory, precision, False)
    runs_on: Literal["cpu", "gpu"] = "gpu" if find(provider).on_gpu else "cpu"
    _check_calibrated(directory, provider, precision, early)
    most = max(PROMPTS_PER_BATCH, rows_per_call(directory.manifest))
    parameters = {"provider": provider, "early": early} | ({"precision": precision} if precision else {})
    with atomic.folder(place) as folder:
        model = folder if place != output else folder / NAME
        version = model / VERSION
        _copy(directory, version / ENGINE, runs_on == "gpu")
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        (model / "config.pbtxt").write_text(_config(most, runs_on, parameters), encoding="utf-8")
    return ModelRepository(output, NAME, provider, precision, runs_on, most)


def _check_calibrated(directory: EngineDirectory, provider: str, precision: str | None, early: Early) -> None:
    known = [
        calibration
        for key, calibration in directory.manifest.calibrations.items()
        if key.rpartition("-")[0] == provider and precision in (None, key.rpartition("-")[2])
    ]
    what = f"{provider}-{precision}" if precision else provider
    if not known:
        raise InputError(
            f"{directory.path} is not calibrated for {what}, so there are no verdicts: run `memedge calibrate`."
        )
    for one in known:
        check_early(Rule.calibrated(one), early, directory.path, what)


def _copy(directory: EngineDirectory, target: Path, with_plans: bool) -> None:
    """Copy what makes up the engine, and the plans that were built for it; nothing that is computed again."""
    target.mkdir(parents=True)
    for name in (FILE_NAME, *directory.manifest.files):
        shutil.copyfile(directory.file(name), target / name)
    built = (folder / plans.FOLDER for folder in cache.folders(directory))
    if with_plans and (found := next((one for one in built if (one / plans.FILE_NAME).is_file()), None)):
        shutil.copytree(found, target / plans.FOLDER, symlinks=True)


def _config(most: int, runs_on: str, parameters: dict[str, str]) -> str:
    outputs = [f'  {{ name: "{name}" data_type: {TYPES[kind]} dims: [ 1 ] }}' for name, (kind, _, _) in OUTPUTS.items()]
    values = [f'parameters {{ key: "{name}" value {{ string_value: "{one}" }} }}' for name, one in parameters.items()]
    return CONFIG.format(
        name=NAME,
        most=most,
        input=INPUT,
        outputs=",\n".join(outputs),
        instances=INSTANCES[runs_on],
        queue=QUEUE,
        microseconds=SECONDS * 1_000_000,
        parameters="\n".join(values),
    )
