"""Reading a directory that Optimum exported (`optimum-cli export onnx`): its parts, and what its own graphs compute."""

import hashlib
import json
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
from memedge.export import optimum_graphs
from memedge.export.checkpoint import Checkpoint, latent_shape, time_ids
from memedge.export.optimum_graphs import GRAPH, POOLED, SAMPLE, STATES, TIME_IDS, TIMESTEP, Packing, open_graph, reason
from memedge.export.torch_checkpoint import padding_tokenizer

PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")
XL_PARTS = ("text_encoder_2", "tokenizer_2")  # what Stable Diffusion XL has besides
LONGEST = 1 << 16  # tokens; transformers gives 10³⁰ where a tokenizer names no length
TIME_ID_COUNT = 6  # of Stable Diffusion XL; its refiner has 5
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def is_optimum(folder: Path) -> bool:
    """Return whether a folder holds a UNet as Optimum writes it."""
    return (folder / "unet" / GRAPH).is_file()


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
        self.scheduler: Mapping[str, Any] = _read_json(folder, "scheduler/scheduler_config.json")
        self.unet_config: Mapping[str, Any] = _read_json(folder, "unet/config.json")
        if missing := {"in_channels", "out_channels", "sample_size"} - self.unet_config.keys():
            raise ExportError(f"{folder / 'unet/config.json'} does not say {min(missing)}: check that it is complete.")
        self.tokenizer, self.tokens, pad = _tokenizer(folder / "tokenizer")
        self._outputs = {"text_encoder": _states(folder, "text_encoder", xl)}  # the output that holds the states
        padding = zeros = None
        if xl:
            self._outputs["text_encoder_2"] = _states(folder, "text_encoder_2", xl)
            padding = _padding(folder, self.tokenizer, pad)
            if _read_json(folder, "model_index.json").get("force_zeros_for_empty_prompt", True):
                zeros = np.array(self.tokenizer.encode("").ids)
        self.state_width, self.pooled_width = _width(inputs[STATES]), _width(inputs[POOLED]) if xl else 0
        image = np.array([time_ids(self.unet_config)], np.float32)
        self._packing = Packing(self.tokens, self.state_width, self.pooled_width, image, padding, zeros)
        self._sessions: dict[str, Any] = {}

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        packing = self._packing
        own = ids if packing.padding is None else _repad(ids, *packing.padding)
        results = [self._run_encoder(part, i) for part, i in zip(self._outputs, (ids, own), strict=False)]
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
        return self._run("unet", None, feeds)[0][0]

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
        outputs = [self._outputs[part], *([POOLED] if part == XL_PARTS[0] else [])]
        return self._run(part, outputs, {given.name: ids.astype(NUMPY[given.type])})


def _require(folder: Path, part: str) -> None:
    if not (folder / part).exists():
        raise ExportError(f"{folder} holds no {part}, so it is not all of what Optimum exports: export it again.")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    _require(folder, name)
    try:
        content = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder / name} cannot be read ({error}): check that it is complete.") from error
    if not isinstance(content, dict):
        raise ExportError(f"{folder / name} holds no JSON object: check that it is complete.")
    return content


def _hash(folder: Path, xl: bool) -> str:
    """Return the SHA-256 over names and hashes of all files that belong to the model, in sorted order."""
    files = [path for part in (*PARTS, *XL_PARTS) for path in (folder / part).rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted([*files, folder / "model_index.json"] if xl else files):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


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
        if name != TIMESTEP and (value.shape is None or isinstance(value.shape[0], int)):
            raise ExportError(f"The UNet of {folder} has a fixed batch: export it without --no-dynamic-axes.")
        if name in (STATES, POOLED, TIME_IDS) and not isinstance(value.shape[-1], int):
            raise ExportError(f"The UNet of {folder} does not say how wide {name} is, so memedge cannot export it.")
    if TIME_IDS in inputs and _width(inputs[TIME_IDS]) != TIME_ID_COUNT:
        raise ExportError(f"{folder} is a refiner, not a base model: memedge exports those that begin with noise.")


def _width(value: ir.Value) -> int:
    """Return an input's last dimension, which `_check_inputs` saw to be known."""
    assert value.shape is not None and isinstance(value.shape[-1], int)
    return value.shape[-1]


def _tokenizer(folder: Path) -> tuple[Tokenizer, int, int]:
    """Return a tokenizer that pads and truncates to its model's length, that length, and the padding's id."""
    try:
        source = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise what they please for a broken file
        raise ExportError(f"{folder} cannot be loaded ({reason(error)}): check that it is complete.") from error
    tokens, pad = int(source.model_max_length), source.pad_token_id
    if tokens > LONGEST or pad is None:
        raise ExportError(f"{folder} names no length or no padding token: check that it is complete.")
    return padding_tokenizer(source, tokens), tokens, int(pad)


def _padding(folder: Path, first: Tokenizer, pad: int) -> tuple[int, int] | None:
    """Return the ids with which the first and the second tokenizer pad, None if they do alike.

    The graph takes the first one's ids alone, so that all else has to be the same.
    """
    second, _, second_pad = _tokenizer(folder / XL_PARTS[1])
    same = json.loads(second.to_str())["model"] == json.loads(first.to_str())["model"]
    ends = first.encode("").ids[1:] == [pad] * (len(first.encode("").ids) - 1)
    if not same or (pad != second_pad and not ends):
        raise ExportError(f"The tokenizers of {folder} differ in more than padding: memedge cannot use one for both.")
    return None if pad == second_pad else (pad, second_pad)


def _states(folder: Path, part: str, xl: bool) -> str:
    """Return which output of a text encoder the UNet takes: the last state, or the last but one for an XL UNet."""
    graph = _checked(folder, part)
    names = [str(value.name) for value in graph.outputs]
    hidden = [name for name in names if name.startswith("hidden_states.")]
    found = f"hidden_states.{len(hidden) - 2}" if xl else "last_hidden_state"
    wanted = [found, *([POOLED] if part == XL_PARTS[0] else [])]
    if len(graph.inputs) != 1 or not set(wanted) <= set(names):
        raise ExportError(
            f"The text encoder in {folder / part} takes {', '.join(str(v.name) for v in graph.inputs)} and has no "
            f"{' and '.join(wanted)}: memedge exports CLIP text encoders."
        )
    return found


def _repad(ids: npt.NDArray[np.int64], end: int, pad: int) -> npt.NDArray[np.int64]:
    """Return ids [B, L] that are padded by repeating the end of text, padded by another id."""
    text = np.cumsum((ids != end)[:, ::-1], axis=1)[:, ::-1]  # how much of it is left, from each position on
    return np.where(np.pad(text[:, :-1], ((0, 0), (1, 0)), constant_values=1) == 0, pad, ids)
