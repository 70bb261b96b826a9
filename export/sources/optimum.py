"""Reading a directory that Optimum exported (`optimum-cli export onnx`): its parts, and what its own graphs compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from memedge.engine.directory import sha256
from memedge.engine.errors import ExportError
from memedge.export.sources import optimum_graphs
from memedge.export.sources.checkpoint import Checkpoint, latent_shape, time_ids
from memedge.export.sources.folder import read_json
from memedge.export.sources.optimum_graphs import GRAPH, POOLED, SAMPLE, STATES, TIME_IDS, TIMESTEP, Packing, open_graph
from memedge.export.sources.parts import hash_of
from memedge.export.sources.tokenizers import padding_tokenizers
from memedge.export.sources.weights import INDEX, SCHEDULER, reading, reason, tokenizer

PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")
XL_PARTS = ("text_encoder_2", "tokenizer_2")  # what Stable Diffusion XL has besides
ENCODERS = ("text_encoder", "text_encoder_2")
TIME_ID_COUNT = 6  # of Stable Diffusion XL; its refiner has 5
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def is_optimum(folder: Path) -> bool:
    """Return whether a folder holds a UNet as Optimum writes it, and none of torch's: SDXL's repository has both."""
    unet = folder / "unet"
    return (unet / GRAPH).is_file() and not any(unet.glob("diffusion_pytorch_model*"))


class OptimumCheckpoint(Checkpoint):
    """See Checkpoint; `encode` and `predict` run Optimum's graphs as they are, with ONNX Runtime, as Optimum does."""

    def __init__(self, folder: Path):
        """Read a directory; weights are looked through, but stay in their files.

        Raises:
            ExportError: a part is missing, cannot be read, or is of a kind that memedge does not export.
        """
        for part in PARTS:
            _require(folder, part)
        unet = _checked(folder, "unet")
        inputs = {str(value.name): value for value in unet.inputs}
        xl = POOLED in inputs
        _check_inputs(folder, inputs)
        for part in XL_PARTS if xl else ():
            _require(folder, part)
        self._folder = folder
        self.id = folder.resolve().name
        self.sha256 = _hash(folder, xl)
        self.scheduler: Mapping[str, Any] = _read_json(folder, SCHEDULER)
        self.unet_config: Mapping[str, Any] = _read_json(folder, "unet/config.json")
        if missing := {"in_channels", "out_channels", "sample_size"} - self.unet_config.keys():
            raise ExportError(f"{folder / 'unet/config.json'} does not say {min(missing)}: check that it is complete.")
        self._outputs = {part: _states(folder, part, xl) for part in ENCODERS[: 1 + xl]}  # which hold the states
        self.tokenizers, self.tokens = _tokenizers([folder / tokenizer(part) for part in self._outputs])
        self.state_width, self.pooled_width = _width(inputs[STATES]), _width(inputs[POOLED]) if xl else 0
        zeros = None
        # Left out, the pipeline takes it for true.
        if xl and _read_json(folder, INDEX).get("force_zeros_for_empty_prompt", True):
            zeros = np.concatenate([one.encode("").ids for one in self.tokenizers])
        image = np.array([time_ids(self.unet_config)], np.float32)
        self._packing = Packing(self.tokens, self.state_width, self.pooled_width, image, zeros)
        self._sessions: dict[str, Any] = {}

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        packing, parts = self._packing, np.split(ids, len(self._outputs), axis=1)
        results = [self._run_encoder(name, own) for name, own in zip(self._outputs, parts, strict=True)]
        states: npt.NDArray[np.float32] = np.concatenate([result[0] for result in results], axis=-1)
        if packing.pooled:
            pooled = results[1][1]
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
        models = [(open_graph(self._folder, part), output) for part, output in self._outputs.items()]
        return optimum_graphs.text_encoder(models, self._packing)

    def unet_graph(self) -> ir.Model:
        """Return the UNet's graph; of `timestep`, the first number is every row's, as Optimum's graphs take one."""
        self._sessions.clear()
        return optimum_graphs.unet(open_graph(self._folder, "unet"), latent_shape(self.unet_config), self._packing)

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
        outputs = [self._outputs[part], *([POOLED] if part == ENCODERS[1] else [])]
        return self._run(part, outputs, {given.name: ids.astype(NUMPY[given.type])})


def _require(folder: Path, part: str) -> None:
    if not (folder / part).exists():
        raise ExportError(f"{folder} holds no {part}, so it is not all of what Optimum exports: export it again.")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    _require(folder, name)
    return read_json(folder / name)


def _hash(folder: Path, xl: bool) -> str:
    """Return the hash of all files that belong to the model."""
    parts = [*PARTS, *(XL_PARTS if xl else ())]
    files = [path for part in parts for path in (folder / part).rglob("*") if path.is_file()]
    files += [folder / INDEX] if xl else []
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


def _check_inputs(folder: Path, inputs: dict[str, ir.Value]) -> None:
    """Refuse UNets of other pipelines than text-to-image by Stable Diffusion 1, 2 and XL."""
    plain, xl = {SAMPLE, TIMESTEP, STATES}, {SAMPLE, TIMESTEP, STATES, POOLED, TIME_IDS}
    if inputs.keys() not in (plain, xl):
        raise ExportError(
            f"The UNet of {folder} takes {', '.join(sorted(inputs))}, memedge's {', '.join(sorted(plain))} or, for "
            f"Stable Diffusion XL, {POOLED} and {TIME_IDS} too: it cannot be exported."
        )
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


def _tokenizers(folders: Sequence[Path]) -> tuple[list[Tokenizer], int]:
    """Return tokenizers that pad and cut to their text encoders' length, and that length."""
    sources = []
    for folder in folders:
        with reading(folder):
            sources.append(AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True))
    return padding_tokenizers(sources)


def _states(folder: Path, part: str, xl: bool) -> str:
    """Return which output of a text encoder the UNet takes: the last state, or the last but one for an XL UNet."""
    graph = _checked(folder, part)
    names = [str(value.name) for value in graph.outputs]
    hidden = [name for name in names if name.startswith("hidden_states.")]
    found = f"hidden_states.{len(hidden) - 2}" if xl else "last_hidden_state"
    wanted = [found, *([POOLED] if part == ENCODERS[1] else [])]
    if len(graph.inputs) != 1 or not set(wanted) <= set(names):
        raise ExportError(
            f"The text encoder in {folder / part} takes {', '.join(str(v.name) for v in graph.inputs)} and has no "
            f"{' and '.join(wanted)}: memedge exports CLIP text encoders."
        )
    return found
