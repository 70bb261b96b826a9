"""What differs between the families of pipelines: how each calls its denoiser, and what an engine's statistics go by.

Family is that of UNets, and others say where they differ from it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from memedge.engine.errors import InputError
from memedge.engine.manifest import Manifest

VAE_SCALE = 8  # pixels per latent, as the export counts them for SDXL's time ids
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
