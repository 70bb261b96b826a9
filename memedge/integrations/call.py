"""One call of a diffusers pipeline: what it asks for, and its arguments with some prompts changed."""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError

# What encode_prompt returns, in its order: the first two, or SDXL's four.
ENCODED = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2")
PER_PROMPT = ("prompt", "prompt_2", "prompt_embeds", "pooled_prompt_embeds")  # what the conditional half is made from


class Call:
    """The arguments of one call, by name, with the pipeline's own defaults.

    Attributes:
        prompts: the prompts; None for each that is given as embeddings.
        images: how many images each is asked for.
        text_only: whether the prompts are all that the text encoders read, and are read as by the engine's; then the
            detector can take them as text.
    """

    def __init__(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """Take a call's arguments.

        Raises:
            TypeError: they are not the pipeline's.
            InputError: return_dict=False, neither a prompt nor embeddings, or both.
        """
        self._pipe = pipe
        signature = inspect.signature(pipe.__call__)
        self._names = signature.parameters
        self._bound = signature.bind(*args, **kwargs)
        if self.get("return_dict") is False:
            raise InputError("A guarded pipeline always returns a GuardedOutput: leave return_dict=False out.")
        prompt, embeddings = self.get("prompt"), self.get("prompt_embeds")
        if (prompt is None) == (embeddings is None):
            raise InputError("Give either prompt or prompt_embeds, and not both: one of them says what to generate.")
        if not isinstance(prompt, str | list | None):
            raise InputError(f"The prompt is {type(prompt).__name__}: give a string, a list of them, or prompt_embeds.")
        if not (embeddings is None or hasattr(embeddings, "detach")):
            raise InputError(f"prompt_embeds is {type(embeddings).__name__}: give a torch tensor, as to the pipeline.")
        self.prompts: list[Any] = [None] * len(embeddings) if prompt is None else _listed(prompt)
        self.images = int(self.get("num_images_per_prompt") or 1)
        self.text_only = prompt is not None and self._read_as_by_the_engine()

    def get(self, name: str) -> Any:
        """Return an argument, its default, or None if the pipeline has none of that name."""
        if name in self._bound.arguments:
            return self._bound.arguments[name]
        return self._names[name].default if name in self._names else None

    def embeddings(
        self, rows: Sequence[int] | slice = slice(None)
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """Return the prompts' embeddings as the pipeline will take them, [B, L, D], and SDXL's pooled ones, [B, P]."""
        given = self.get("prompt_embeds") is not None
        tensors = self._bound.arguments if given else self._encode()
        pooled = tensors.get("pooled_prompt_embeds")
        return _numpy(tensors["prompt_embeds"])[rows], None if pooled is None else _numpy(pooled)[rows]

    def use_embeddings(self) -> None:
        """Replace all text by the embeddings that the pipeline makes of it, so that they can be set."""
        self._bound.arguments.update(self._encode())
        for name in TEXTS:
            self._bound.arguments.pop(name, None)

    def set_embeddings(self, row: int, states: npt.NDArray[np.float32], pooled: npt.NDArray[np.float32] | None) -> None:
        """Set one prompt's embeddings, [L, D] and [P], after `use_embeddings`."""
        for name, values in (("prompt_embeds", states), ("pooled_prompt_embeds", pooled)):
            if values is not None:
                tensor = self._bound.arguments[name]
                tensor[row] = tensor.new_tensor(values)

    def replace(self, rows: Sequence[int], donor: int) -> None:
        """Put one of several prompts in the place of others.

        The batch keeps its shape and its order, and so all others get the same random numbers and the same pictures.
        """
        for name in PER_PROMPT:
            values = self.get(name)
            if values is None or isinstance(values, str) or len(values) != len(self.prompts):
                continue
            changed = list(values) if isinstance(values, list) else values.clone()
            for row in rows:
                changed[row] = values[donor]
            self._bound.arguments[name] = changed

    def run(self) -> Any:
        """Call the pipeline; returns its own output."""
        return self._pipe(*self._bound.args, **self._bound.kwargs)

    def _encode(self) -> dict[str, Any]:
        """Return the embeddings that the pipeline makes of its arguments, a row for each prompt."""
        import torch

        scale = (self.get("cross_attention_kwargs") or {}).get("scale")  # of a LoRA, as the pipeline reads it
        own = {
            "device": self._pipe._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "lora_scale": scale,
        }
        wanted = inspect.signature(self._pipe.encode_prompt).parameters
        given = {name: own.get(name, self.get(name)) for name in wanted if name in own or name in self._names}
        with torch.no_grad():
            made = self._pipe.encode_prompt(**given)
        return {name: tensor for name, tensor in zip(ENCODED, made, strict=False) if tensor is not None}

    def _read_as_by_the_engine(self) -> bool:
        """Return whether nothing but the engine's own text encoders on the prompt itself makes the embeddings."""
        if any(self.get(name) is not None for name in ("clip_skip", "pooled_prompt_embeds")):
            return False
        if self.get("prompt_2") is not None and _listed(self.get("prompt_2")) != self.prompts:
            return False
        tokenizer = self._pipe.tokenizer
        # Others than the special ones were added by textual inversion.
        return set(tokenizer.get_added_vocab()) <= set(tokenizer.all_special_tokens)


def _numpy(tensor: Any) -> npt.NDArray[np.float32]:
    """Return a torch tensor of any floating type, on any device, as float32."""
    array: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def _listed(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) else list(prompt)
