"""What differs between the families of pipelines: how each calls its denoiser, and what an engine's statistics go by.

All that the guard knows of a family of models stands in one class: Family is that of UNets, and others say where they
differ from it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.manifest import Flow, Manifest

VAE_SCALE = 8  # pixels per latent, as the export counts them for SDXL's time ids
PATCH = 2  # latents of an image token in each direction, as the export counts them for mu
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Fact = tuple[str, Any, Any]  # what it is of, the pipeline's, the engine's


class Family:
    """Stable Diffusion 1, 2 and XL.

    Attributes:
        part: the pipeline's attribute that holds the denoiser.
        network: what it is called in messages.
        flow: whether it was trained by flow matching.
        attention: the call's argument that may scale a LoRA.
        repeats: whether the pipeline repeats embeddings that it is given, for each of a prompt's images.
        adapter: the denoiser's attribute that an IP-Adapter sets.
        scale: the call's argument of classifier-free guidance.
        above: the largest value of it at which the pipeline does not guide.
        apart: whether the conditional half is a call of its own, before the other one, and its embeddings too.
        cond_first: whether the conditional half stands before the other one in a call of both.
        lists: whether embeddings are a list of [n, D], as long as prompts are.
        encoded: what encode_prompt returns, in its order, as far as it has that much.
    """

    part = "unet"
    network = "UNet"
    flow = False
    attention = "cross_attention_kwargs"
    repeats = True
    adapter = "encoder_hid_proj"
    scale = "guidance_scale"
    above = 1
    apart = False
    cond_first = False
    lists = False
    encoded: tuple[str, ...] = (
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    def denoiser(self, pipe: Any) -> Any:
        """Return a pipeline's denoiser."""
        return getattr(pipe, self.part)

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        """Return what has to be the same of a pipeline and of an engine's model."""
        config, told = pipe.unet.config, getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None
        return [
            ("number of latent channels", config.in_channels, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.cross_attention_dim, manifest.state_width),
            ("prediction type", getattr(pipe.scheduler.config, "prediction_type", "epsilon"), manifest.prediction_type),
            ("input for the guidance scale", told, manifest.guidance is not None),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        """Raise InputError where a call's predictions are not those that the engine's statistics are of.

        Args:
            pipe: the pipeline.
            get: returns the value of one of the call's arguments, or None.
            manifest: the engine's.
        """
        del pipe
        scale = get("guidance_scale")
        if manifest.guidance is not None and scale != manifest.guidance:
            raise InputError(
                f"guidance_scale is {scale}, and the engine's model is told {manifest.guidance:g}: call the pipeline "
                f"with that one, or export an engine with --guidance {scale}."
            )

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        """Return the latents of all rows and the timestep that the sampler called the denoiser with."""
        return args[0], float(args[1] if len(args) > 1 else kwargs["timestep"])

    def guides(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> bool:
        """Return whether a call of the denoiser is one of the sampler's with classifier-free guidance.

        Args:
            args: the call's.
            kwargs: the call's.
            images: how many the pipeline makes.
        """
        del args, kwargs, images
        return True

    def predictions(self, output: Any) -> Any:
        """Return what the denoiser gave, a row each, as one tensor: ε, or v as samplers step by it."""
        return output[0]

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        """Return the arguments for the empty prompt in some rows of a call.

        Args:
            args: the call's.
            kwargs: the call's.
            rows: which.
            prompts: the prompt of each.
            empty: the empty prompt's embeddings for each prompt, and pooled ones or None.
        """
        more = dict(kwargs, encoder_hidden_states=empty[0][prompts])
        if empty[1] is not None:
            added = kwargs["added_cond_kwargs"]
            more["added_cond_kwargs"] = dict(added, text_embeds=empty[1][prompts], time_ids=added["time_ids"][rows])
        if kwargs.get("timestep_cond") is not None:
            more["timestep_cond"] = kwargs["timestep_cond"][rows]
        return (args[0][rows], *args[1:]), more

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        """Return the denoiser's prediction [2, C, H, W] as the engine was exported of it, for rows of one prompt."""
        more: dict[str, Any] = {}
        if pooled is not None:
            height, width = (VAE_SCALE * side for side in manifest.latent_shape[1:])
            ids = sample.new_tensor([[height, width, 0, 0, height, width]] * 2)
            more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        if manifest.guidance is not None:
            told = sample.new_tensor([manifest.guidance - 1] * 2).float()
            embedding = pipe.get_guidance_scale_embedding(told.cpu(), pipe.unet.config.time_cond_proj_dim)
            more["timestep_cond"] = embedding.to(sample.device, sample.dtype)
        prediction = pipe.unet(
            sample, timesteps, encoder_hidden_states=states, cross_attention_kwargs=attention, return_dict=False, **more
        )
        return prediction[0]


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: one call of the transformer for both halves, its arguments by name."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "joint_attention_kwargs"
    repeats = False
    adapter = "image_proj"

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width),
            ("width of pooled prompt embeddings", config.pooled_projection_dim, manifest.pooled_width),
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, pipe.default_sample_size)
        if get("prompt_embeds") is None:
            check_length(get, manifest.tokens - pipe.tokenizer_max_length)  # behind CLIP's
        mu, shift = get("mu"), manifest.flow and manifest.flow.mu
        if mu is not None and shift is not None and mu != shift:
            raise InputError(f"mu is {mu}, and that of the engine's size is {shift:g}: leave it out.")

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del args
        return kwargs["hidden_states"], float(kwargs["timestep"][0])

    def guides(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> bool:
        del args, images
        return kwargs.get("skip_layers") is None  # skip-layer guidance calls once more in some steps

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = {name: kwargs[name][rows] for name in ("hidden_states", "timestep")}
        states = {"encoder_hidden_states": empty[0][prompts], "pooled_projections": empty[1][prompts]}
        return args, dict(kwargs, **own, **states)

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        del manifest
        prediction = pipe.transformer(
            hidden_states=sample,
            timestep=timesteps,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        return prediction[0]


class Flux(Family):
    """Flux.1: packed latents; a second call where true_cfg_scale and a negative prompt ask for one."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "joint_attention_kwargs"
    repeats = False
    scale = "true_cfg_scale"
    apart = True
    encoded = ("prompt_embeds", "pooled_prompt_embeds")

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels // PATCH**2, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width),
            ("width of pooled prompt embeddings", config.pooled_projection_dim, manifest.pooled_width),
            ("input for the guidance scale", bool(config.guidance_embeds), manifest.guidance is not None),
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, pipe.default_sample_size)
        if get("prompt_embeds") is None:
            check_length(get, manifest.tokens)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del args
        return kwargs["hidden_states"], 1000 * float(kwargs["timestep"][0])

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = {name: kwargs[name][rows] for name in ("hidden_states", "timestep")}
        if kwargs["guidance"] is not None:
            own["guidance"] = kwargs["guidance"][rows]
        states = {"encoder_hidden_states": empty[0][prompts], "pooled_projections": empty[1][prompts]}
        return args, dict(kwargs, **own, **states)

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        rows, channels, height, width = sample.shape
        places = pipe._prepare_latent_image_ids(rows, height // PATCH, width // PATCH, sample.device, sample.dtype)
        told = None if manifest.guidance is None else sample.new_tensor([manifest.guidance] * rows).float()
        prediction = pipe.transformer(
            hidden_states=pipe._pack_latents(sample, rows, channels, height, width),
            timestep=timesteps.to(sample.dtype) / 1000,
            guidance=told,
            pooled_projections=pooled,
            encoder_hidden_states=states,
            txt_ids=sample.new_zeros(states.shape[1], 3),
            img_ids=places,
            joint_attention_kwargs=attention,
            return_dict=False,
        )
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(prediction[0], scale * height, scale * width, scale)


class QwenImage(Family):
    """Qwen-Image: packed latents; a second call as Flux's; embeddings filled up to the longest, with a mask."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "attention_kwargs"
    scale = "true_cfg_scale"
    apart = True
    encoded = ("prompt_embeds", "prompt_embeds_mask")

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels // PATCH**2, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.joint_attention_dim, manifest.state_width - 1),  # but for the mask
            ("input for the guidance scale", bool(config.guidance_embeds), manifest.guidance is not None),
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, pipe.default_sample_size)
        check_length(get, manifest.tokens)  # to which given embeddings are cut too

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del args
        return kwargs["hidden_states"], 1000 * float(kwargs["timestep"][0])

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = {name: kwargs[name][rows] for name in ("hidden_states", "timestep")}
        states = {"encoder_hidden_states": empty[0][prompts], "encoder_hidden_states_mask": None}  # all are as long
        return args, dict(kwargs, **own, **states)

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        del manifest, pooled
        rows, channels, height, width = sample.shape
        prediction = pipe.transformer(
            hidden_states=pipe._pack_latents(sample, rows, channels, height, width),
            timestep=timesteps.to(sample.dtype) / 1000,
            encoder_hidden_states=states,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * rows,
            attention_kwargs=attention,
            return_dict=False,
        )
        scale = pipe.vae_scale_factor
        return pipe._unpack_latents(prediction[0], scale * height, scale * width, scale)[:, :, 0]


class ZImage(Family):
    """Z-Image: lists of latents and of embeddings, by position; times 1 − σ; −v; and [cond; uncond] in one call."""

    part = "transformer"
    network = "transformer"
    flow = True
    attention = "joint_attention_kwargs"
    above = 0
    cond_first = True
    lists = True

    def facts(self, pipe: Any, manifest: Manifest) -> list[Fact]:
        config = pipe.transformer.config
        return [
            ("prediction type", "flow", manifest.prediction_type),
            ("number of latent channels", config.in_channels, manifest.latent_shape[0]),
            ("width of prompt embeddings", config.cap_feat_dim, manifest.state_width - 1),  # but for the mask
            *noise_facts(pipe, manifest),
        ]

    def check_call(self, pipe: Any, get: Callable[[str], Any], manifest: Manifest) -> None:
        super().check_call(pipe, get, manifest)
        check_size(get, manifest, pipe.vae_scale_factor, 1024 // pipe.vae_scale_factor)
        if get("prompt_embeds") is None:
            check_length(get, manifest.tokens)

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        del kwargs
        return _joined(args[0]), 1000 * (1 - float(args[1][0]))

    def guides(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: int) -> bool:
        del kwargs
        return len(args[0]) != images  # cfg_truncation leaves the other half out

    def predictions(self, output: Any) -> Any:
        return -_joined(output[0])

    def with_empty(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: Sequence[int],
        prompts: Sequence[int],
        empty: tuple[Any, Any],
    ) -> Arguments:
        own = [args[0][row] for row in rows], args[1][rows], [empty[0][prompt] for prompt in prompts]
        return own, kwargs

    def predict(
        self, pipe: Any, manifest: Manifest, sample: Any, timesteps: Any, states: Any, pooled: Any, attention: Any
    ) -> Any:
        del manifest, pooled
        latents, times = list(sample[:, :, None]), (1000 - timesteps) / 1000
        output = pipe.transformer(latents, times, list(states), joint_attention_kwargs=attention, return_dict=False)
        return self.predictions(output)


UNETS = Family()
FLOWS: dict[str, Family] = {
    "StableDiffusion3Pipeline": StableDiffusion3(),
    "FluxPipeline": Flux(),
    "QwenImagePipeline": QwenImage(),
    "ZImagePipeline": ZImage(),
}


def family_of(pipe: Any) -> Family:
    """Return the family of a pipeline by its class, or the one that it is made of; UNets' where it is none of them."""
    return next((FLOWS[kind.__name__] for kind in type(pipe).__mro__ if kind.__name__ in FLOWS), UNETS)


def noise_facts(pipe: Any, manifest: Manifest) -> list[Fact]:
    """Return how a flow-matching pipeline's scheduler spreads its noise levels at the engine's size."""
    kind, config = type(pipe.scheduler).__name__, pipe.scheduler.config
    known = ("scheduler", kind, "FlowMatchEulerDiscreteScheduler")
    if manifest.flow is None or kind != known[2]:
        return [known]
    flow, shift, mu = manifest.flow, None, None
    if config.use_dynamic_shifting:
        _, height, width = manifest.latent_shape
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        mu = float(config.base_shift + slope * (height * width // PATCH**2 - config.base_image_seq_len))
    else:
        shift = float(pipe.scheduler.shift)
    own = Flow(shift, mu, config.time_shift_type, config.shift_terminal or None, flow.sigmas)
    return [
        ("shift of noise levels", own.shift, flow.shift),
        ("mu of noise levels", own.mu, flow.mu),
        ("shift_terminal", own.terminal, flow.terminal),
        ("time_shift_type", own.time_shift, flow.time_shift),
    ]


def check_length(get: Callable[[str], Any], own: int) -> None:
    """Raise InputError unless a call's prompts are read up to the engine's max_sequence_length."""
    length = get("max_sequence_length")
    if length != own:
        raise InputError(
            f"max_sequence_length is {length}, and the engine's is {own}: call the pipeline with that one, or export "
            f"an engine with --max-sequence-length {length}."
        )


def check_size(get: Callable[[str], Any], manifest: Manifest, scale: int, default: int) -> None:
    """Raise InputError unless a call's latents are as large as the engine's.

    Args:
        get: returns the value of one of the call's arguments, or None.
        manifest: the engine's.
        scale: pixels per latent.
        default: the side of the pipeline's own latents.
    """
    latents = get("latents")
    own = [scale * side for side in manifest.latent_shape[1:]]
    found = [int(get(name) or default * scale) for name in ("height", "width")]
    if latents is not None and latents.ndim == 4:  # packed ones are of the size that is said, or it is an error
        found = [scale * side for side in latents.shape[-2:]]
    if found != own:
        raise InputError(
            f"The call's pictures are of {found[1]}x{found[0]} pixels, and the engine's statistics of {own[1]}x{own[0]}"
            f": call the pipeline with width={own[1]} and height={own[0]}, or export an engine with --size "
            f"{found[1]}x{found[0]}."
        )


def _joined(pictures: Sequence[Any]) -> Any:
    """Return pictures [C, 1, H, W] as one tensor [N, C, H, W]."""
    import torch

    return torch.stack(list(pictures))[:, :, 0]
