"""One call of a diffusers pipeline: what it asks for, and its arguments with some prompts changed."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from memedge.engine.errors import InputError
from memedge.integrations.checks import Needs, check_scale
from memedge.integrations.denoiser_calls import AllOver, DenoiserCall, DenoiserCalls
from memedge.integrations.families.find import family_of
from memedge.prompts.text import checked_prompts

ADAPTERS = tuple(f"{sign}ip_adapter_image{kind}" for sign in ("", "negative_") for kind in ("", "_embeds"))
ENCODED = (
    "prompt_embeds",
    "prompt_embeds_mask",
    "pooled_prompt_embeds",
    "negative_prompt_embeds",
    "negative_prompt_embeds_mask",
    "negative_pooled_prompt_embeds",
)
TEXTS = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
NEGATIVE = (*TEXTS[3:], *ENCODED[3:])


class Embeddings(NamedTuple):
    """What prompts are generated from, as `score_embeddings` takes it: [B, L, D] or a list of [n, D]."""

    states: npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]
    pooled: npt.NDArray[np.float32] | None  # [B, P]
    mask: npt.NDArray[np.float32] | None  # [B, L]


class Call:
    """The arguments of one call, by name, with the pipeline's own defaults.

    Attributes:
        prompts: the prompts; None for each that is given as embeddings.
        images: how many images each is asked for.
    """

    def __init__(self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]):
        """Take a call's arguments.

        Raises:
            TypeError: they are not the pipeline's.
            InputError: return_dict=False, no prompt, a prompt and embeddings, or what guides beside or after them.
        """
        self._pipe, self._family = pipe, family_of(pipe)
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
        if not (embeddings is None or _are_tensors(embeddings, self._family.lists)):
            wanted = "a list of torch tensors" if self._family.lists else "a torch tensor"
            raise InputError(f"prompt_embeds is {type(embeddings).__name__}: give {wanted}, as to the pipeline.")
        self._check_guides()
        given = self._bound.arguments.items()
        self._negative = any(value is not None for name, value in given if name.startswith("negative_"))
        self.prompts: list[Any] = [None] * len(embeddings) if prompt is None else _listed(prompt)
        self.images = int(self.get("num_images_per_prompt") or 1)
        if prompt is not None:
            list(checked_prompts(self.prompts))
            if not self.prompts:
                raise InputError("There are no prompts to generate from: give at least one.")

    def check_guided(self, needs: Needs) -> None:
        """Raise InputError unless the call guides, as diffusers decides it."""
        given = [self.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")]
        if self._family.apart and not any(given):
            raise InputError(
                f"{type(self._pipe).__name__} makes no unguided prediction without a negative prompt, and {needs.what} "
                f'needs one: give a negative_prompt, be it "", with {self._family.scale} above 1, or {needs.instead}.'
            )
        check_scale(self.get(self._family.scale), needs, self._family.scale, self._family.above)

    def get(self, name: str) -> Any:
        """Return an argument, its default, or None if the pipeline has none of that name."""
        if name in self._bound.arguments:
            return self._bound.arguments[name]
        return self._names[name].default if name in self._names else None

    def embeddings(self, rows: Sequence[int] | None = None) -> Embeddings:
        """Return all prompts' embeddings, or some, as the pipeline is given them, after `use_embeddings`."""
        rows = range(len(self.prompts)) if rows is None else rows
        states, pooled = self.get("prompt_embeds"), self.get("pooled_prompt_embeds")
        mask = self.get("prompt_embeds_mask")
        return Embeddings(
            [_numpy(states[row]) for row in rows] if self._family.lists else _numpy(states)[rows],
            None if pooled is None else _numpy(pooled)[rows],
            None if mask is None else _numpy(mask)[rows],
        )

    def empty(self) -> tuple[Any, Any] | None:
        """Return what the pipeline takes where no negative prompt is given: embeddings [B, L, D], and pooled ones.

        Tensors, or a list of [n, D], and None for pooled ones in models without. None if nothing negative is given, be
        it a size of SDXL's: then the pipeline's own call has them.
        """
        if not self._negative or self._negative_is_empty():
            return None
        text = [""] * len(self.prompts) if self.get("prompt") is None else self.get("prompt")
        leave_out = dict.fromkeys((*ENCODED, *NEGATIVE, "prompt_2", "prompt_3"))
        if self._family.apart:
            made = self._encode(**(leave_out | {"prompt": [""] * len(self.prompts)}))
            return made["prompt_embeds"], made.get("pooled_prompt_embeds")
        made = self._encode(**(leave_out | {"prompt": text}))
        return made["negative_prompt_embeds"], made.get("negative_pooled_prompt_embeds")

    def _negative_is_empty(self) -> bool:
        """Return whether the other half of a pipeline that makes it apart is asked for with the empty prompt itself."""
        others = [self.get(name) for name in NEGATIVE if name != "negative_prompt"]
        text = self.get("negative_prompt")
        return self._family.apart and others == [None] * len(others) and set(_listed(text)) == {""}

    def use_embeddings(self) -> None:
        """Replace all text by the embeddings that the pipeline makes of it, which it then generates from.

        So nothing is read twice, as it might be read otherwise then.
        """
        if self.get("prompt_embeds") is None:
            self._bound.arguments.update(self._encode())
            if self._family.apart and self.get("negative_prompt") is not None:
                texts = {name: self.get(f"negative_{name}") for name in ("prompt", "prompt_2")}
                made = self._encode(**dict.fromkeys(ENCODED), **texts)
                self._bound.arguments.update({f"negative_{name}": value for name, value in made.items()})
        for name in TEXTS:
            self._bound.arguments.pop(name, None)

    def set_embeddings(self, row: int, states: npt.NDArray[np.float32], pooled: npt.NDArray[np.float32] | None) -> None:
        """Set one prompt's embeddings, [L, D] or [n, D], and [P], after `use_embeddings`."""
        for name, values in (("prompt_embeds", states), ("pooled_prompt_embeds", pooled)):
            if values is not None:
                own = self._bound.arguments[name][row]
                own[: len(values)] = own.new_tensor(values)  # behind them are zeros

    def replace(self, rows: Sequence[int], donor: int) -> None:
        """Put one of several prompts in the place of others, after `use_embeddings`.

        The batch keeps its shape, its mask and its order, so that all others get the same random numbers, the same
        arithmetic and the same pictures: what is as long as its prompt is repeated, or cut, to the other's length.
        """
        import torch

        for name in ("prompt_embeds", "pooled_prompt_embeds"):
            values = self.get(name)
            if values is None:
                continue
            changed, own = list(values) if self._family.lists else values.clone(), values[donor]
            for row in rows:
                changed[row] = own[torch.arange(len(values[row])) % len(own)]
            self._bound.arguments[name] = changed

    def only(self, images: Sequence[int]) -> "Call":
        """Return a call for some of the images alone, each of a prompt of its own; after `use_embeddings`.

        They start from other noise: what their generators draw next, and not from latents that were given.
        """
        rows, generator = [image // self.images for image in images], self.get("generator")
        made = copy.copy(self)
        made._bound = inspect.BoundArguments(self._bound.signature, OrderedDict(self._bound.arguments))
        made.prompts, made.images = [self.prompts[row] for row in rows], 1
        arguments = made._bound.arguments
        arguments.pop("latents", None)
        arguments["num_images_per_prompt"] = 1
        if isinstance(generator, list):
            arguments["generator"] = [generator[image] for image in images]
        for name in ENCODED:
            if arguments.get(name) is not None:
                arguments[name] = arguments[name][rows]
        return made

    def run(self) -> Any:
        """Call the pipeline; returns its own output."""
        bound = self._bound
        if self.images > 1 and self.get("prompt_embeds") is not None and not self._family.repeats:
            bound = inspect.BoundArguments(bound.signature, OrderedDict(bound.arguments))
            for name in ENCODED:
                if (embeddings := bound.arguments.get(name)) is not None:
                    bound.arguments[name] = embeddings.repeat_interleave(self.images, dim=0)
            bound.arguments["num_images_per_prompt"] = 1
        return self._pipe(*bound.args, **bound.kwargs)

    def watched(self, needs: Needs, watchers: Sequence[Callable[[DenoiserCall], None]]) -> Any:
        """Call the pipeline while functions see its denoiser's calls; returns None if one of them raised AllOver."""
        output = None
        try:
            with DenoiserCalls(self._pipe, len(self.prompts), self.images, needs, watchers, empty=self.empty()):
                output = self.run()
        except AllOver:
            pass
        finally:
            if output is None:
                self._pipe.maybe_free_model_hooks()  # as the pipeline does at its end
        return output

    def _encode(self, **instead: Any) -> dict[str, Any]:
        """Return the embeddings that the pipeline makes of its arguments, or of others, a row for each prompt."""
        import torch

        scale = (self.get(self._family.attention) or {}).get("scale")  # of a LoRA, as the pipeline reads it
        own = {
            "device": self._pipe._execution_device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "lora_scale": scale,
            **instead,
        }
        wanted = _parameters(self._pipe)
        given = {name: own[name] if name in own else self.get(name) for name in wanted if name in {*own, *self._names}}
        # Z-Image writes into the lists that it is given.
        given = {name: list(value) if isinstance(value, list) else value for name, value in given.items()}
        with torch.no_grad():
            made = dict(zip(self._family.encoded, self._pipe.encode_prompt(**given), strict=False))
        if "prompt_embeds_mask" in made and made["prompt_embeds_mask"] is None:  # without, the pipeline warns
            made["prompt_embeds_mask"] = made["prompt_embeds"].new_ones(made["prompt_embeds"].shape[:2]).long()
        return {name: tensor for name, tensor in made.items() if tensor is not None}

    def _check_guides(self) -> None:
        """Raise InputError if something but the prompts says what is generated, or changes it under way."""
        for name in ADAPTERS:
            if self.get(name) is not None:
                raise InputError(f"{name} guides beside the prompt, and the engine judges prompts alone: leave it out.")
        callback = self.get("callback_on_step_end")
        if callback is None:
            return
        taken = getattr(callback, "tensor_inputs", None) or self.get("callback_on_step_end_tensor_inputs") or []
        if other := sorted(set(taken) - {"latents"}):
            raise InputError(
                f"The callback takes {', '.join(other)}, and might change what the prompt is generated from after it "
                "was judged: let it take latents only."
            )

        def watched(*args: Any, **kwargs: Any) -> Any:
            returned = callback(*args, **kwargs)
            if other := sorted(set(returned or ()) - {"latents"}):
                raise InputError(
                    f"The callback returns {', '.join(other)}, which were not judged: return latents only."
                )
            return returned

        if not hasattr(callback, "tensor_inputs"):
            self._bound.arguments["callback_on_step_end"] = watched


def _parameters(pipe: Any) -> set[str]:
    """Return what a pipeline's encode_prompt takes by name; one that hands on the rest takes what its bases take."""
    parameters = inspect.signature(pipe.encode_prompt).parameters
    names = set(parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        own = [vars(kind)["encode_prompt"] for kind in type(pipe).__mro__ if "encode_prompt" in vars(kind)]
        names = names.union(*(inspect.signature(one).parameters for one in own))
    return names


def _numpy(tensor: Any) -> npt.NDArray[np.float32]:
    """Return a torch tensor of any floating type, on any device, as float32."""
    array: npt.NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return array


def _are_tensors(embeddings: Any, lists: bool) -> bool:
    """Return whether embeddings are a torch tensor, or a list of them."""
    if lists != isinstance(embeddings, list):
        return False
    return all(hasattr(one, "detach") for one in (embeddings if lists else [embeddings]))


def _listed(prompt: Any) -> list[Any]:
    return [prompt] if isinstance(prompt, str) else list(prompt)
