"""How ONNX Runtime is called on tensors where they lie."""

from typing import Any

from memedge.engine.errors import EngineError, shown
from memedge.engine.memory import Memory, Tensor


def bind(memory: Memory, binding_call: Any, name: str, tensor: Tensor) -> None:
    """Bind a tensor of this memory by `bind_input` or `bind_output` of an IOBinding."""
    binding_call(name, memory.device, memory.index, tensor.dtype, tensor.shape, tensor.pointer)


def run(memory: Memory, session: Any, binding: Any, options: Any, rows: int) -> None:
    """Run a session on what is bound; raises EngineError in ONNX Runtime's words."""
    try:
        with memory.current():
            session.run_with_iobinding(binding, options)
    except Exception as error:  # ONNX Runtime's errors share no public base class
        reason = shown(str(error).strip().partition("\n")[0], 240)
        raise EngineError(
            f"ONNX Runtime cannot compute {rows} rows on {memory.name} ({reason}): use a smaller batch size, "
            "or export the engine again."
        ) from None
