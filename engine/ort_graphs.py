"""Small calls of ONNX Runtime on a GPU, recorded as CUDA graphs: launching them one by one takes longer than computing.

What ONNX Runtime (read in its source; gpu_graph_id is of 1.18) and CUDA ask for, and how it is met here:

- A graph reads and writes where it did when it was recorded. So each has inputs and an output of its own, which are
  copied to and from.
- A session keeps the graphs of each thread apart, and a thread that has none records again. So one thread runs them
  all, and others wait for it.
- A convolution keeps one cuDNN plan, that of its last shape, whose kernels a graph may still run when another shape has
  replaced the plan. So each recorded shape has a session of its own, with the weights once more, which runs nothing
  else. It is made in that one thread, too, whose cuBLAS and cuDNN handles it keeps.
- While a graph is recorded, ONNX Runtime forbids all threads what could spoil it, as allocating: such calls fail, and
  the recording with them. Our own threads are exempt (CudaMemory.current) or wait (`quiet`). Others, as a pipeline's,
  should not use the GPU meanwhile.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime

from memedge.engine.arrays import Floats, Indices
from memedge.engine.errors import EngineError
from memedge.engine.memory import Memory, Tensor, part, reduced
from memedge.engine.ort_calls import bind, run

Result = TypeVar("Result")
Given = Mapping[str, npt.NDArray[Any] | Tensor]

RUN_ID = "1"  # any but 0, which is ONNX Runtime's own, and −1; one per session is enough
NOT_RECORDED = "-1"
# A replay and a plain run are the same kernels, but not all of those add up in the same order each time.
CLOSE = 0.01  # of the largest value

# Held while a graph is recorded, and while a session is made, which allocates on the GPU outside of any memory of ours.
quiet = threading.Lock()


def sizes(draws: int, most: int) -> list[int]:
    """Return the numbers of rows worth a session: one prompt's at one timestep, and at both."""
    return sorted({min(draws, most), min(2 * draws, most)})


def run_options(run_id: str) -> Any:
    """Return RunOptions for sessions on a GPU: by `run_id`, and without waiting for the GPU where it can be."""
    made = onnxruntime.RunOptions()
    made.add_run_config_entry("disable_synchronize_execution_providers", "1")
    made.add_run_config_entry("gpu_graph_id", run_id)
    return made


class OneThread:
    """Does what it is called with in one thread of its own, one after the other, while the callers wait.

    No pool of concurrent.futures, which refuses work as soon as the interpreter begins to end (engine/native.py waits).
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._starting = threading.Lock()
        self._started = False

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns, or raise what it raises."""
        with self._starting:
            if not self._started:
                threading.Thread(target=_serve, args=(self._tasks,), name="memedge-graphs", daemon=True).start()
                self._started = True
        done: Future[Result] = Future()

        def task() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        self._tasks.put(task)
        return done.result()

    def __del__(self) -> None:
        self._tasks.put(None)


def _serve(tasks: "SimpleQueue[Callable[[], None] | None]") -> None:
    while task := tasks.get():
        task()
        del task  # which keeps a caller's tensors


class Recorded:
    """A session that computes one shape on tensors of its own, as a CUDA graph. Only one thread may use it.

    Attributes:
        inputs: what it reads, by name; filled before each call.
        output: what it writes, float32 [rows, …]; the next call overwrites it.
    """

    def __init__(
        self,
        session: Any,
        memory: Memory,
        inputs: Mapping[str, tuple[Sequence[int], npt.DTypeLike]],
        shared: Mapping[str, Tensor],
    ):
        """Bind the session's tensors.

        Args:
            session: with `enable_cuda_graph`; nobody else runs it.
            memory: where it runs.
            inputs: shape and dtype of each input that calls give; the first dimension of each is the same.
            shared: further inputs, which never change.
        """
        self._session, self._memory = session, memory
        self.inputs = {name: memory.empty(tuple(shape), dtype) for name, (shape, dtype) in inputs.items()}
        self.rows = next(iter(self.inputs.values())).shape[0]
        (output,) = session.get_outputs()
        self.output = memory.empty((self.rows, *output.shape[1:]), np.float32)
        self._shared = shared  # kept alive
        self._binding = session.io_binding()
        for name, tensor in {**self.inputs, **shared}.items():
            bind(memory, self._binding.bind_input, name, tensor)
        bind(memory, self._binding.bind_output, output.name, self.output)
        self._recorded, self._plain = run_options(RUN_ID), run_options(NOT_RECORDED)

    def __call__(self, given: Given) -> Tensor:
        """Fill inputs, an array [rows, …] or a tensor [at most rows, …] each, queue the graph, and return the output.

        The first call runs the session twice as it is, records it, and takes as long.
        """
        return self._run(given, self._recorded)

    def check(self, first: Given, second: Given) -> None:
        """Record by the first inputs; raise EngineError unless a replay on the second is what a plain run gives."""
        self(first)
        found = self._memory.download(self(second))
        expected = self._memory.download(self._run(second, self._plain))
        if not np.allclose(found, expected, rtol=0, atol=CLOSE * float(np.abs(expected).max())):
            raise EngineError(f"A CUDA graph of {self.rows} rows gave other values than the same calls, or none.")

    def _run(self, given: Given, how: Any) -> Tensor:
        for name, value in given.items():
            target = self.inputs[name]
            if isinstance(value, Tensor):
                self._memory.copy(value, part(target, 0, value.shape[0]))
            else:
                self._memory.write(value, target)
        run(self._memory, self._session, self._binding, how, self.rows)
        return self.output


class Recordings:
    """The recorded calls of a backend, and the one thread that makes them.

    Attributes:
        prompts: numbers of prompts that the text encoder is recorded for.
        rows: numbers of rows that the UNet is recorded for.
    """

    def __init__(self, memory: Memory):
        self._memory = memory
        self._text: dict[int, Recorded] = {}
        self._unet: dict[int, Recorded] = {}
        self._call = OneThread()

    @property
    def prompts(self) -> list[int]:
        return sorted(self._text)

    @property
    def rows(self) -> list[int]:
        return sorted(self._unet)

    def record_text(self, make_session: Callable[[], Any], prompts: int) -> None:
        """Record the text encoder for so many prompts; raises EngineError if it cannot be."""
        session = self._call(make_session)
        (ids,) = session.get_inputs()
        shape = (prompts, *ids.shape[1:])
        recorded = Recorded(session, self._memory, {"ids": (shape, np.int64)}, {})
        first, second = ({"ids": np.full(shape, value, np.int64)} for value in (0, 1))
        self._check(recorded, first, second)
        self._text[prompts] = recorded

    def record_unet(self, make_session: Callable[[], Any], rows: int, cached: Mapping[str, Tensor]) -> None:
        """Record the UNet for so many rows, and for as many prompts; raises EngineError if it cannot be."""
        session = self._call(make_session)
        width = next(value.shape[1:] for value in session.get_inputs() if value.name == "states")
        shape = (rows, *width)
        index = (rows,), np.int64
        recorded = Recorded(
            session, self._memory, {"states": (shape, np.float32), "prompt": index, "row": index}, cached
        )
        last = next(iter(cached.values())).shape[0] - 1
        zeros = {"states": np.zeros(shape, np.float32), "prompt": np.zeros(rows, np.int64)}
        self._check(recorded, {**zeros, "row": np.zeros(rows, np.int64)}, {**zeros, "row": np.full(rows, last)})
        self._unet[rows] = recorded

    def encode(self, ids: Indices) -> Tensor:
        """Return the states of ids [B, …], B of `prompts`."""
        recorded = self._text[len(ids)]
        return self._call(lambda: self._copied(recorded({"ids": ids})))

    def takes(self, states: Tensor, row: Indices) -> bool:
        """Return whether a call of the UNet with these states and rows is recorded."""
        return len(row) in self._unet and states.shape[0] <= len(row)

    def predict(self, states: Tensor, prompt: Indices, row: Indices) -> Tensor:
        """Return predictions, as Backend.predict, for what it `takes`."""
        recorded = self._unet[len(row)]
        return self._call(lambda: self._copied(recorded({"states": states, "prompt": prompt, "row": row})))

    def statistics(self, states: Tensor, prompt: Indices, row: Indices, uncond: Tensor, operands: str) -> Floats:
        """Return statistics, as Backend.statistics, for what it `takes`."""
        recorded = self._unet[len(row)]

        def work() -> Floats:
            prediction = recorded({"states": states, "prompt": prompt, "row": row})
            return reduced(self._memory, prediction, uncond, recorded.inputs["row"], operands)

        return self._call(work)

    def _check(self, recorded: Recorded, first: Given, second: Given) -> None:
        with quiet:
            self._call(lambda: recorded.check(first, second))

    def _copied(self, tensor: Tensor) -> Tensor:
        own = self._memory.empty(tensor.shape, tensor.dtype)
        self._memory.copy(tensor, own)
        return own
