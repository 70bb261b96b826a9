"""torch's tensors as the reduction reads them."""

from typing import Any

from memedge.engine.reduction import core_status


def readable(tensor: Any) -> Any:
    """Return a tensor where it is, if the reduction reads there; else in host memory. It is contiguous.

    It is read on a CPU, and on an NVIDIA GPU by a core that was built with nvcc. From all other devices some hundred
    kilobytes are copied.
    """
    import torch

    here = tensor.device.type == "cpu" or (tensor.is_cuda and torch.version.cuda is not None and core_status().cuda)
    return (tensor if here else tensor.cpu()).contiguous()
