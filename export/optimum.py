"""Reading a directory that Optimum exported (`optimum-cli export onnx`): its parts, and what its own graphs compute."""

import hashlib
import json
from dataclasses import dataclass
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
from memedge.export.optimum_graphs import GRAPH, POOLED, SAMPLE, STATES, TIME_IDS, TIMESTEP, open_graph

PARTS = ("unet", "text_encoder", "tokenizer", "scheduler")
XL_PARTS = ("text_encoder_2", "tokenizer_2")  # what Stable Diffusion XL has besides
TIME_ID_COUNT = 6  # of Stable Diffusion XL; its refiner has 5
NUMPY = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


def is_optimum(folder: Path) -> bool:
    """Return whether a folder holds a UNet as Optimum writes it."""
    return (folder / "unet" / GRAPH).is_file()


@dataclass(frozen=True)
class Packing:
    """How one tensor of states holds all that a UNet takes of a prompt, and what an empty or padded prompt is.

    Attributes:
        tokens: L.
        width: D, of one token's state.
        pooled: the width of the pooled state, which is row L, padded by zeros; 0 where the UNet takes none.
        side: pixels along an edge of the image, which the UNet is told if it takes a pooled state.
        padding: the end-of-text token with which the first tokenizer pads, and the second one's own; None: no matter.
        zeros: the ids [L] of the prompt whose states are all zero; None: of none.
    """

    tokens: int
    width: int
    pooled: int
    side: int
    padding: tuple[int, int] | None
    zeros: npt.NDArray[np.int64] | None

    @property
    def time_ids(self) -> npt.NDArray[np.float32]:
        """The image's size, where it was cropped, and the size wanted, [1, 6], as the pipeline has it by default."""
        return np.array([[self.side, self.side, 0, 0, self.side, self.side]], np.float32)


class OptimumCheckpoint:
    """A directory exported by Optimum, fp32: a `checkpoint.Checkpoint`, whose attributes are described there."""

    def __init__(self, folder: Path):
        """Read a directory; weights are looked through, but stay in their files.

        Raises:
            ExportError: a part is missing, cannot be read, or is of a kind that memedge does not export.
        """
        for part in PARTS:
            _require(folder, part)
        unet = _checked(folder, "unet")
        self._inputs = {str(value.name): value for value in unet.inputs}
        xl = POOLED in self._inputs
        _check_inputs(folder, self._inputs)
        for part in XL_PARTS if xl else ():
            _require(folder, part)
        self._folder = folder
        self.id = folder.resolve().name
        self.sha256 = _hash(folder, xl)
        self.scheduler = _read_json(folder, "scheduler/scheduler_config.json")
        self.unet_config = _read_json(folder, "unet/config.json")
        self.latent_shape = _latent_shape(folder, self.unet_config, self._inputs[SAMPLE])
        self.tokenizer, self.tokens, pad = _tokenizer(folder / "tokenizer")
        self._outputs = {"text_encoder": _states(folder, "text_encoder", xl)}  # the output that holds the states
        padding = zeros = None
        if xl:
            self._outputs["text_encoder_2"] = _states(folder, "text_encoder_2", xl)
            padding = _padding(folder, self.tokenizer, pad)
            if _read_json(folder, "model_index.json").get("force_zeros_for_empty_prompt", True):
                zeros = np.array(self.tokenizer.encode("").ids)
        width, pooled = _width(self._inputs[STATES]), _width(self._inputs[POOLED]) if xl else 0
        self.states_shape = (self.tokens + xl, width)
        self._packing = Packing(self.tokens, width, pooled, 8 * self.latent_shape[1], padding, zeros)
        self._sessions: dict[str, Any] = {}

    def encode(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the states [B, K, D] of ids [B, L], by the graphs as Optimum wrote them."""
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
        """Return the prediction [C, H, W] for one sample [C, H, W] and states [K, D], by the graph as Optimum wrote it."""
        session, packing = self._session("unet"), self._packing
        time = next(given for given in session.get_inputs() if given.name == TIMESTEP)
        feeds = {
            SAMPLE: sample[None],
            TIMESTEP: np.full([1] * len(time.shape), timestep, NUMPY[time.type]),
            STATES: states[None, : packing.tokens],
        }
        if packing.pooled:
            feeds |= {POOLED: states[None, packing.tokens, : packing.pooled], TIME_IDS: packing.time_ids}
        prediction: npt.NDArray[np.float32] = session.run(None, feeds)[0][0]
        return prediction

    def text_encoder_graph(self) -> ir.Model:
        """Return the graph ids int64 [prompts, L] → states float32 [prompts, K, D]."""
        for part in self._outputs:
            self._sessions.pop(part, None)  # the memory is needed
        models = [(open_graph(self._folder, part), output) for part, output in self._outputs.items()]
        return optimum_graphs.text_encoder(models, self._packing)

    def unet_graph(self) -> ir.Model:
        """Return the graph sample [rows, C, H, W], timestep, states [prompts, K, D], prompt [rows] → prediction.

        `timestep` is int64 [rows] as in graphs of other checkpoints, but its first number is every row's, since
        Optimum's graphs take one. The reference's memory is freed.
        """
        self._sessions.clear()
        return optimum_graphs.unet(open_graph(self._folder, "unet"), self.latent_shape, self._packing)

    def _session(self, part: str) -> Any:
        if part not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            path = self._folder / part / GRAPH
            self._sessions[part] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return self._sessions[part]

    def _run_encoder(self, part: str, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
        """Return a text encoder's states, and its pooled state if the UNet takes that encoder's."""
        session = self._session(part)
        given = session.get_inputs()[0]
        outputs = [self._outputs[part], *([POOLED] if part == XL_PARTS[0] else [])]
        results: list[npt.NDArray[np.float32]] = session.run(outputs, {given.name: ids.astype(NUMPY[given.type])})
        return results


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
    if TIME_IDS in inputs and _width(inputs[TIME_IDS]) != TIME_ID_COUNT:
        raise ExportError(f"{folder} is a refiner, not a base model: memedge exports those that begin with noise.")


def _width(value: ir.Value) -> int:
    assert value.shape is not None
    return int(value.shape[-1])  # type: ignore[arg-type]  # Optimum leaves it open nowhere; TODO


def _latent_shape(folder: Path, config: dict[str, Any], sample: ir.Value) -> tuple[int, int, int]:
    channels, side = config.get("in_channels"), config.get("sample_size")
    if not isinstance(channels, int) or not isinstance(side, int):
        raise ExportError(f"{folder / 'unet/config.json'} names no in_channels or sample_size: check it.")
    if config.get("out_channels") != channels:
        raise ExportError(
            f"The UNet of {folder} takes {channels} channels and predicts {config.get('out_channels')}, as for inpainting: "
            "memedge exports those for text-to-image."
        )
    return channels, side, side


def _tokenizer(folder: Path) -> tuple[Tokenizer, int, int]:
    """Return a tokenizer that pads and truncates to its model's length, that length, and the padding's id."""
    try:
        source = AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
        tokenizer: Tokenizer = source.backend_tokenizer
    except Exception as error:  # transformers and tokenizers raise what they please for a broken file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ExportError(f"{folder} cannot be loaded ({reason}): check that it is complete.") from error
    tokens, pad = int(source.model_max_length), source.pad_token_id
    if tokens > 1 << 16 or pad is None:
        raise ExportError(f"{folder} names no length or no padding token: check that it is complete.")
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens, pad_id=pad, pad_token=source.pad_token)
    return tokenizer, tokens, int(pad)


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
