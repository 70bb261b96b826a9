"""Reading a directory that Optimum exported (`optimum-cli export onnx`): its parts, and what its own graphs compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.export.sources import optimum_graphs
from memedge.export.sources.architectures import ARCHITECTURES, Architecture, Encoder
from memedge.export.sources.check_traits import check_folder
from memedge.export.sources.checkpoint import Checkpoint, latent_shape, time_ids
from memedge.export.sources.folder import tokenizers, zeros_for_empty
from memedge.export.sources.optimum_graphs import GRAPH, POOLED, SAMPLE, STATES, TIME_IDS, TIMESTEP, Packing, open_graph
from memedge.export.sources.parts import hash_of
from memedge.export.sources.tokenizers import empty_ids, padding_tokenizers
from memedge.export.sources.weights import INDEX, SCHEDULER, read_json, reason
from memedge.wording import listed

TIME_ID_COUNT = 6  # of a base model; SDXL's refiner has 5
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def is_optimum(folder: Path) -> bool:
    """Return whether a folder holds a UNet as Optimum writes it, and none of torch's: a repository may have both."""
    unet = folder / "unet"
    return (unet / GRAPH).is_file() and not any(unet.glob("diffusion_pytorch_model*"))


class OptimumCheckpoint(Checkpoint):
    """See Checkpoint; `encode` and `predict` run Optimum's graphs as they are, with ONNX Runtime, as Optimum does."""

    def __init__(self, folder: Path):
        """Read a directory; weights are looked through, but stay in their files.

        Raises:
            ExportError: a part is missing, cannot be read, or is of a kind that memedge does not export.
        """
        _require(folder, "unet")
        unet = _checked(folder, "unet")
        inputs = {str(value.name): value for value in unet.inputs}
        self.architecture = architecture = _architecture(folder, inputs)
        _check_inputs(folder, inputs)
        parts = [*architecture.modules, *architecture.tokenizers, "scheduler"]
        if architecture.zeros_for_empty:
            parts.append(INDEX)
        for part in parts:
            _require(folder, part)
        self._folder = folder
        self.id = folder.resolve().name
        self.sha256 = _hash(folder, parts)
        self.scheduler: Mapping[str, Any] = _read_json(folder, SCHEDULER)
        self._unet_config: Mapping[str, Any] = _read_json(folder, "unet/config.json")
        if missing := {"in_channels", "out_channels", "sample_size"} - self._unet_config.keys():
            raise ExportError(f"{folder / 'unet/config.json'} does not say {min(missing)}: check that it is complete.")
        if self._unet_config.get("time_cond_proj_dim") is not None:
            raise ExportError(
                f"The UNet of {folder} takes an embedding of the guidance scale, which its graph leaves out: export "
                "the model that Optimum was given."
            )
        self.notes = check_folder(folder, architecture)
        self._outputs = {encoder.folder: _taken(folder, encoder) for encoder in architecture.encoders}
        self.tokenizers, self.lengths = padding_tokenizers(tokenizers(folder, architecture))
        self.tokens = self.lengths[0]
        self.latent_shape = latent_shape(self._unet_config)
        self.state_width = _width(inputs[STATES])
        self.pooled_width = _width(inputs[POOLED]) if POOLED in inputs else 0
        zeros = empty_ids(self.tokenizers) if zeros_for_empty(folder, architecture) else None
        image = np.array([time_ids(self._unet_config)], np.float32)
        self._packing = Packing(self.tokens, self.state_width, self.pooled_width, image, zeros)
        self._sessions: dict[str, Any] = {}

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        packing, parts = self._packing, np.split(ids, len(self._outputs), axis=1)
        results = [self._run_encoder(part, own) for part, own in zip(self._outputs, parts, strict=True)]
        states: npt.NDArray[np.float32] = np.concatenate([result[0] for result in results], axis=-1)
        if packing.pooled:
            pooled = np.concatenate([array for result in results for array in result[1:]], axis=-1)
            row = np.pad(pooled, ((0, 0), (0, packing.width - packing.pooled)))
            states = np.concatenate([states, row[:, None]], axis=1)
        if packing.zeros is not None:
            states[(ids == packing.zeros).all(axis=1)] = 0
        return states

    def predict(
        self, sample: npt.NDArray[np.float32], timestep: int, states: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        packing, time = self._packing, self._given("unet")[TIMESTEP]
        feeds = {
            SAMPLE: sample[None],
            TIMESTEP: np.full([1] * len(time.shape), timestep, NUMPY[time.type]),
            STATES: states[None, : packing.tokens],
        }
        if packing.pooled:
            feeds |= {POOLED: states[None, packing.tokens, : packing.pooled], TIME_IDS: packing.time_ids}
        prediction: npt.NDArray[np.float32] = self._run("unet", None, feeds)[0][0]
        return prediction

    def text_encoder_graph(self) -> ir.Model:
        for part in self._outputs:
            self._sessions.pop(part, None)  # the memory is needed
        models = [(open_graph(self._folder, part), outputs) for part, outputs in self._outputs.items()]
        return optimum_graphs.text_encoder(models, self._packing)

    def unet_graph(self) -> ir.Model:
        """Return the UNet's graph; of `timestep`, the first number is every row's, as Optimum's graphs take one."""
        self._sessions.clear()
        return optimum_graphs.unet(open_graph(self._folder, "unet"), self.latent_shape, self._packing)

    def _given(self, part: str) -> dict[str, Any]:
        """Return the inputs of a part's session, which is opened if it isn't yet."""
        if part not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # what goes wrong is raised
            options.enable_cpu_mem_arena = False  # which would keep the room for the largest logits, and more each call
            path = self._folder / part / GRAPH
            try:
                self._sessions[part] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's errors have no class in common
                raise ExportError(f"ONNX Runtime cannot open {path} ({reason(error)}): export it again.") from error
        return {given.name: given for given in self._sessions[part].get_inputs()}

    def _run(
        self, part: str, outputs: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]
    ) -> list[npt.NDArray[np.float32]]:
        try:
            results: list[npt.NDArray[np.float32]] = self._sessions[part].run(outputs, feeds)
        except Exception as error:
            path = self._folder / part / GRAPH
            raise ExportError(f"ONNX Runtime cannot run {path} ({reason(error)}): export it again.") from error
        return results

    def _run_encoder(self, part: str, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
        """Return a text encoder's states, and its pooled state if the UNet takes that encoder's."""
        (given,) = self._given(part).values()
        return self._run(part, self._outputs[part], {given.name: ids.astype(NUMPY[given.type])})


def _require(folder: Path, part: str) -> None:
    if not (folder / part).exists():
        raise ExportError(f"{folder} holds no {part}, so it is not all of what Optimum exports: export it again.")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    _require(folder, name)
    return read_json(folder / name)


def _hash(folder: Path, parts: Sequence[str]) -> str:
    """Return the hash of all files that belong to the model: its parts are files and folders."""
    paths = [path for part in parts for path in (folder / part, *(folder / part).rglob("*"))]
    files = [path for path in paths if path.is_file()]
    return hash_of((path.relative_to(folder).as_posix(), sha256(path)) for path in files)


def _checked(folder: Path, part: str) -> ir.Graph:
    """Return a graph, all of whose weights are finite."""
    graph = open_graph(folder, part).graph
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and not np.isfinite(tensor.numpy()).all():
            raise ExportError(f"{folder / part} holds NaN or infinity in {value.name!r}: the checkpoint is damaged.")
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # what was read of the file
    return graph


def _architecture(folder: Path, inputs: dict[str, ir.Value]) -> Architecture:
    """Return the family whose UNets take these inputs; refuse those of other pipelines than text-to-image."""
    plain = {SAMPLE, TIMESTEP, STATES}
    for row in ARCHITECTURES:
        if inputs.keys() == plain | set(row.optimum_inputs):
            return row
    more = [f"for {row.name}, {listed(row.optimum_inputs, 'and')} too" for row in ARCHITECTURES if row.optimum_inputs]
    raise ExportError(
        f"The UNet of {folder} takes {', '.join(sorted(inputs))}, memedge's {', '.join(sorted(plain))} or, "
        f"{' or, '.join(more)}: it cannot be exported."
    )


def _check_inputs(folder: Path, inputs: dict[str, ir.Value]) -> None:
    """Refuse UNets whose inputs have sizes that do not fit, and refiners."""
    for name, value in inputs.items():
        shape = tuple(value.shape or ())
        if name != TIMESTEP and (not shape or isinstance(shape[0], int)):
            raise ExportError(f"The UNet of {folder} has a fixed batch: export it without --no-dynamic-axes.")
        if name in (STATES, POOLED, TIME_IDS) and not isinstance(shape[-1], int):
            raise ExportError(f"The UNet of {folder} does not say how wide {name} is, so memedge cannot export it.")
    if TIME_IDS in inputs and _width(inputs[TIME_IDS]) != TIME_ID_COUNT:
        raise ExportError(f"{folder} is a refiner, not a base model: memedge exports those that begin with noise.")


def _width(value: ir.Value) -> int:
    """Return an input's last dimension, which `_check_inputs` saw to be known."""
    assert value.shape is not None and isinstance(value.shape[-1], int)
    return value.shape[-1]


def _taken(folder: Path, encoder: Encoder) -> list[str]:
    """Return which outputs of a text encoder the UNet takes: its states, and its pooled state if it takes that."""
    graph = _checked(folder, encoder.folder)
    names = [str(value.name) for value in graph.outputs]
    hidden = [name for name in names if name.startswith("hidden_states.")]
    states = f"hidden_states.{len(hidden) - 2}" if encoder.penultimate else "last_hidden_state"
    wanted = [states, *([POOLED] if encoder.pooled else [])]
    if len(graph.inputs) != 1 or not set(wanted) <= set(names):
        raise ExportError(
            f"The text encoder in {folder / encoder.folder} takes {', '.join(str(v.name) for v in graph.inputs)} and "
            f"has no {' and '.join(wanted)}: memedge exports CLIP text encoders."
        )
    return wanted
