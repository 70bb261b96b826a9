"""The model that NVIDIA Triton's Python backend runs: a verdict on each prompt of the requests that Triton batched.

Triton alone has triton_python_backend_utils, so that nothing but the model.py that `memedge triton` writes imports this
module. docs/triton.md says how it is served.
"""

import json
import logging
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from memedge.detector import Detector
from memedge.engine.errors import InputError, MemedgeError, ProviderError
from memedge.integrations.triton_repository import ENGINE
from memedge.protocol import INPUT, OUTPUTS
from memedge.results import Verdict

MOST_BYTES = 1 << 20  # of a request's prompts: to tokenize more would keep all others waiting
LOG = logging.getLogger("memedge")


class TritonPythonModel:
    """One instance of the model, in a process of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the engine that lies beside model.py, as the parameters of config.pbtxt say, and warm it up.

        Raises:
            EngineError: the engine was damaged, or cannot run here as the parameters say.
            ProviderError: the instance is for another GPU than the first.
            InputError: the engine is not calibrated for what runs it, or not for `early`.
        """
        config = json.loads(args["model_config"])
        wanted = {name: one["string_value"] for name, one in config["parameters"].items()}
        if args["model_instance_kind"] == "GPU" and args["model_instance_device_id"] != "0":
            raise ProviderError(
                f"memedge runs on GPU 0, and this instance is for GPU {args['model_instance_device_id']}: write "
                "`gpus: [ 0 ]` into its instance_group, and give other GPUs a tritonserver of their own by "
                "CUDA_VISIBLE_DEVICES."
            )
        engine = Path(args["model_repository"]) / args["model_version"] / ENGINE
        self._detector = Detector.load(engine, wanted["provider"], wanted.get("precision"))
        self._early: Any = wanted["early"]
        info = self._detector.info
        if info.rule.threshold is None:
            raise InputError(
                f"{engine} is not calibrated for {info.key}, so there are no verdicts: run `memedge calibrate`, and "
                "write the repository again."
            )
        self._detector.warmup((1, config["max_batch_size"]))
        self._detector.detect(["warm up"], self._early)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response per request. What is wrong with one of them is its own error."""
        asked = [_prompts(request) for request in requests]
        found = iter(self._judge([one for one in asked if isinstance(one, list)]))
        return [_response(next(found) if isinstance(one, list) else one) for one in asked]

    def finalize(self) -> None:
        """Close the engine while the interpreter is whole."""
        del self._detector

    def _judge(self, requests: list[list[str]]) -> list[list[Verdict] | Exception]:
        """Judge the prompts of all requests at once; if that fails, each request alone, to know whose fault it is."""
        if not requests:
            return []
        try:
            verdicts = iter(self._detector.detect(chain.from_iterable(requests), self._early))
        except Exception as error:
            if len(requests) > 1:
                return [answer for one in requests for answer in self._judge([one])]
            if not isinstance(error, MemedgeError):
                LOG.exception("A prompt could not be judged.")
            return [error]
        return [list(islice(verdicts, len(one))) for one in requests]


def _prompts(request: Any) -> list[str] | InputError:
    """Return the prompts of a request, or what is wrong with them."""
    raw: list[bytes] = pb_utils.get_input_tensor_by_name(request, INPUT).as_numpy().ravel().tolist()
    if (size := sum(map(len, raw))) > MOST_BYTES:
        return InputError(f"The prompts have {size} bytes: give at most {MOST_BYTES} in a request.")
    texts: list[str] = []
    for one in raw:
        try:
            texts.append(one.decode())
        except UnicodeDecodeError:
            return InputError(f"Prompt {len(texts) + 1} is not valid UTF-8: correct or remove it.")
    return texts


def _response(answer: list[Verdict] | Exception) -> Any:
    """Return the outputs, [N, 1] each, or the error."""
    if isinstance(answer, InputError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), pb_utils.TritonError.INVALID_ARG))
    if isinstance(answer, MemedgeError):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer)))
    if isinstance(answer, Exception):
        said = f"The prompt could not be judged ({type(answer).__name__}): the log of the server has the traceback."
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(said))
    columns = {name: (dtype, [field(one) for one in answer]) for name, (_, dtype, field) in OUTPUTS.items()}
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, np.array(values, dtype=dtype).reshape(-1, 1))
            for name, (dtype, values) in columns.items()
        ]
    )
