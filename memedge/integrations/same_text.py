"""Whether a pipeline reads a prompt as the engine does: by the embeddings that both make of it, and nothing else."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from memedge.detector import Detector
from memedge.engine.embeddings import pack
from memedge.integrations.call import Embeddings

# The largest difference of embeddings that counts as rounding, relative to the largest value. What is more is scored as
# embeddings, which is right too, but takes all passes. bf16 is also what OpenVINO computes in.
ROUNDING = {"float16": 1e-2, "fp16": 1e-2, "bfloat16": 5e-2, "bf16": 5e-2}
EXACT = 1e-3


def read_alike(prompts: Sequence[Any], embeddings: Embeddings, detector: Detector, dtype: str) -> list[bool]:
    """Return whether each prompt is text, and its embeddings are the engine's own of that text, but for rounding.

    None are to an engine that was exported without its text encoder.

    Args:
        prompts: text, or None where embeddings were given.
        embeddings: what the pipeline generates from.
        detector: the detector.
        dtype: the pipeline's, such as "torch.float16".

    Raises:
        InputError: the embeddings are not of the engine's shape, as those of prompts longer than it reads.
    """
    engine = detector.engine
    array = pack(engine.directory.manifest, *embeddings)
    if None in prompts or not engine.directory.manifest.reads_prompts:
        return [False] * len(prompts)
    own = engine.backend.memory.download(engine.encode(engine.tokenize(prompts)[0]).tensor)
    allowed = max(ROUNDING.get(name, EXACT) for name in (dtype.removeprefix("torch."), detector.info.precision))
    scale = np.abs(own).max(axis=(1, 2))
    alike: list[bool] = (np.abs(array - own).max(axis=(1, 2)) <= allowed * scale).tolist()
    return alike
