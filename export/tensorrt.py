"""An engine's graphs → TensorRT plans, by TensorRT 10, 11 or TensorRT-RTX: one code, all have the names it uses.

Networks are strongly typed: the precision is what the ONNX files say, and float32 is float32, not TF32.
TensorRT measures kernels on the GPU that it builds for. TensorRT-RTX builds for any target on any machine, and leaves
what depends on the very GPU to the first run there.
"""

import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from memedge.engine import plans, probe
from memedge.engine.directory import SCREENS, TEXT_ENCODER, UNET, EngineDirectory
from memedge.engine.engine import rows_per_call
from memedge.engine.errors import InputError, ProviderError
from memedge.engine.machine import peak_memory
from memedge.engine.plans import Component, Plan
from memedge.engine.providers import PROVIDERS
from memedge.engine.tensorrt_module import PlanProvider, load_module, make_logger, one_line
from memedge.export.graphs.expand_attention import read_expanded

# In this order, so that TensorRT has timed the UNet's layers when it comes to graphs of some of them.
FILES: dict[Component, str] = {"text": TEXT_ENCODER, "unet": UNET, **dict(zip(plans.SCREENS, SCREENS, strict=True))}
MOST = 1 << 16  # rows per call


@dataclass(frozen=True)
class _Job:
    """What is the same for all plans of a build."""

    trt: Any
    provider: PlanProvider
    directory: EngineDirectory
    place: Path
    most: int
    workspace: float | None

    @property
    def label(self) -> str:
        return f"{PROVIDERS[self.provider].product} {self.trt.__version__}"

    @property
    def files(self) -> dict[Component, str]:
        """What is compiled, of all that engines may hold."""
        return {component: file for component, file in FILES.items() if file in self.directory.manifest.files}

    def timing_name(self, target: str) -> str:
        return f"timing-{self.provider}-{target}-{self.trt.__version__}.cache"


def local_target() -> tuple[str, str] | None:
    """Return the first GPU's target, such as "sm89", and its model's name; None where there is none."""
    gpus = probe.driver().gpus
    return (gpus[0].target, gpus[0].name) if gpus else None


def build(
    path: Path,
    provider: PlanProvider,
    gpus: Sequence[str] | None = None,
    *,
    max_batch: int | None = None,
    workspace: float | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
    local: Callable[[], tuple[str, str] | None] = local_target,
) -> list[Plan]:
    """Compile an engine's graphs into plans, and record them beside the engine (engine/plans.py).

    These are the text encoder, the UNet, and the UNet up to each tap, for the screen.

    Args:
        path: the engine directory.
        provider: whose plans.
        gpus: targets such as "SM89"; default: this machine's GPU, which is the only one that TensorRT builds for.
        max_batch: the most rows (prompt × timestep × draw) of a UNet call, and prompts of a text encoder call; default:
            what memory surely allows (engine/engine.py).
        workspace: the most GPU memory that a layer may use beside its inputs and outputs, in GiB; default: TensorRT's.
        progress: is told (done, total), in hundredths of a plan, from another thread.
        local: finds this machine's GPU.

    Returns:
        The plans' entries, of one target after the other.

    Raises:
        InputError: max_batch or workspace is out of range.
        ProviderError: TensorRT is not installed, does not know a target, or refuses a graph. Plans of the targets
            before stay recorded; of this one nothing is left.
        EngineError: what is wrong with the engine directory, or that there is no place for plans.
    """
    if max_batch is not None and not 1 <= max_batch <= MOST:
        raise InputError(f"{max_batch} rows per call cannot be had: give a number from 1 to {MOST}.")
    if workspace is not None and not 0 < workspace <= 1024:
        raise InputError(f"A workspace of {workspace} GiB cannot be had: give more than 0 and at most 1024.")
    trt = load_module(provider)
    targets, gpu = _targets(trt, provider, gpus, local)
    directory = EngineDirectory.open(path)
    if directory.manifest.precision == "int8":
        raise ProviderError(f"{path} is an int8 engine, which only ONNX Runtime runs: build from one in fp16 or fp32.")
    most = max_batch or rows_per_call(directory.manifest)
    job = _Job(trt, provider, directory, plans.writable_folder(directory), most, workspace)
    built: list[Plan] = []
    for target in targets:
        total = len(job.files) * len(targets)
        built += _build_target(job, target, gpu, partial(_tell, progress, len(built), total))
    return built


def _build_target(job: _Job, target: str, gpu: str | None, progress: Callable[[float], None]) -> list[Plan]:
    """Compile and record all plans of one target; a function, so that nothing of their size outlives it."""
    fresh = []
    for number, (component, file) in enumerate(job.files.items()):

        def step(share: float, before: int = number) -> None:
            progress(before + share)

        start = time.perf_counter()
        content = _compile(job, job.directory.file(file), target, step)
        step(1)
        plan = plans.describe(
            content,
            component=component,
            backend=job.provider,
            target=target,
            version=job.trt.__version__,
            gpu=gpu,
            most=job.most,
            seconds=time.perf_counter() - start,
            peak_memory=peak_memory(),
        )
        fresh.append((plan, content))
    plans.record(job.place, job.directory, fresh)
    return [plan for plan, _ in fresh]


def _tell(progress: Callable[[int, int], None], before: int, total: int, done: float) -> None:
    """Report in hundredths what TensorRT reports in shares of plans."""
    progress(int(100 * (before + done)), 100 * total)


def _targets(
    trt: Any, provider: PlanProvider, gpus: Sequence[str] | None, local: Callable[[], tuple[str, str] | None]
) -> tuple[list[str], str | None]:
    """Return the targets, such as "sm89", and the GPU's name if plans are for that model alone."""
    label = f"{PROVIDERS[provider].product} {trt.__version__}"
    asked = list(dict.fromkeys(gpu.strip().lower() for gpu in gpus)) if gpus is not None else None
    if provider == "tensorrt-rtx":
        known = [name for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]
        if asked is None:
            here = local()
            if here is None:
                raise ProviderError(f"There is no GPU here: name targets with --gpu, of {', '.join(known)}.")
            asked = [here[0]]
        unknown = [target.upper() for target in asked if target.upper() not in known]
        if unknown or not asked:
            raise ProviderError(f"{label} cannot build for {', '.join(unknown) or 'nothing'}: use {', '.join(known)}.")
        return asked, None
    here = local()
    if here is None:
        raise ProviderError(
            "TensorRT builds on the GPU that a plan is for, and there is none here: run this where it is, or use "
            "--provider tensorrt-rtx."
        )
    if asked not in (None, [here[0]]):
        raise ProviderError(
            f"TensorRT builds for this machine's GPU alone, which is {here[0].upper()} ({here[1]}): leave --gpu out, "
            "or use --provider tensorrt-rtx."
        )
    return [here[0]], here[1]


def _compile(job: _Job, path: Path, target: str, progress: Callable[[float], None]) -> memoryview:
    """Return the plan of one ONNX file for one target."""
    trt = job.trt
    log = make_logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError:  # what the bindings make of a library that returns nothing
        raise ProviderError(f"{job.label} does not start here ({log.reason}): update the GPU's driver.") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    # The path says where the weights are, if not in the graph: they are read from there, not copied.
    if not parser.parse(read_expanded(job.directory, path.name), str(path)):
        problems = (parser.get_error(i) for i in range(parser.num_errors))
        reason = "; ".join(f"{problem.node_operator()} {problem.node_name()}: {problem.desc()}" for problem in problems)
        raise ProviderError(f"{job.label} cannot read {path} ({one_line(reason)}): export the engine again.")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.add_optimization_profile(_profile(builder, network, job))
    if job.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(job.workspace * (1 << 30)))
    if job.provider == "tensorrt-rtx":
        # With no target set, a build succeeds all the same, for nobody knows what.
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], 0):
            raise ProviderError(f"{job.label} refuses the target {target.upper()} ({log.reason}): name another GPU.")
        # Without it, TensorRT-RTX may allocate memory while it runs, which CUDA graphs cannot hold.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    else:
        # Not in TensorRT-RTX, which times nothing while it builds; a timing cache would only make it ask for a GPU
        # (NVIDIA's TensorRT-RTX documentation, "Timing Cache Migration").
        _set_timing(job, config, target)
    monitor = _make_monitor(trt, progress)
    config.progress_monitor = monitor
    # In a thread of its own, so that an interrupt never surfaces inside TensorRT's calls to us, which may not raise.
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(builder.build_serialized_network, network, config)
        try:
            plan = future.result()
        except BaseException:
            monitor.stopped = True
            raise
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        raise ProviderError(
            f"{job.label} cannot compile {path} for {target.upper()} ({log.reason}): name another GPU, or export the "
            "engine in another precision."
        )
    if job.provider == "tensorrt":
        timing = config.get_timing_cache()
        plans.record_cache(job.place, job.directory, job.timing_name(target), memoryview(timing.serialize()))
    return memoryview(plan)


def _profile(builder: Any, network: Any, job: _Job) -> Any:
    """Return the range of the first dimension of inputs where it is dynamic; fastest for one prompt alone.

    The UNet computes a prompt's 2n rows, and a tap its first n, each against a reference.
    """
    profile = builder.create_optimization_profile()
    draws = job.directory.manifest.draws
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    screens = any(tensor.name == "reference" for tensor in inputs)
    rows = min(draws if screens else 2 * draws, job.most)
    for tensor in inputs:
        first, *rest = tensor.shape
        if tensor.name == "reference":
            profile.set_shape(tensor.name, (draws, *rest), (draws, *rest), (draws, *rest))
        elif first == -1:
            best = 1 if tensor.name == "ids" else rows  # engine/tensorrt.py gives as many prompts as rows
            profile.set_shape(tensor.name, (1, *rest), (best, *rest), (job.most, *rest))
    return profile


def _set_timing(job: _Job, config: Any, target: str) -> None:
    """Give TensorRT what it measured in earlier builds, or an empty cache where there is none that it accepts."""
    for content in (plans.read_cache(job.place, job.directory, job.timing_name(target)), b""):
        timing = config.create_timing_cache(content)
        if timing is not None and config.set_timing_cache(timing, False):
            return


def _make_monitor(trt: Any, progress: Callable[[float], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Makes one share of all, from 0 to 1, of TensorRT's nested phases, which any of its threads may report."""

        def __init__(self) -> None:
            super().__init__()
            self.stopped = False
            self.error: Exception | None = None
            self._lock = threading.Lock()
            self._phases: dict[str, tuple[float, float]] = {}  # phase → share of all done, share of one step
            self._share = 0.0

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                done, size = self._phases.get(parent or "", (0.0, 1.0))
                self._phases[name] = (done, size / steps)

        def step_complete(self, name: str, _step: int) -> bool:
            """Return whether TensorRT is to go on."""
            with self._lock:
                done, size = self._phases[name]
                self._phases[name] = (done + size, size)
                self._share = max(self._share, done + size)
                try:
                    progress(self._share)
                except Exception as error:  # it must not pass through TensorRT
                    self.error = error
                return not self.stopped and self.error is None

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.pop(name, None)

    return Monitor()
