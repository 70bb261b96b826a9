"""The families of models: what depends on which of them a checkpoint belongs to stands in one row of a table.

A new family is a row here, and what is truly new about it: a module that makes its states (text_encoders.py), and what
its UNet is given besides (torch_checkpoint.py, optimum_graphs.py). Classes are named, and imported where they are
needed: what is downloaded from a hub is known without torch. Whether prompts begin with BOS, engines see in their
tokenizers (engine/tokenizer.py).
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal

from memedge.export.sources.presets import OF_STABLE_DIFFUSION, Published


@dataclass(frozen=True)
class Encoder:
    """A text encoder of a family.

    Attributes:
        folder: of the text encoder, in diffusers' format and in Optimum's.
        tokenizer: the folder of its tokenizer.
        reader: the name of transformers' class that reads it.
        penultimate: whether the UNet takes its last but one states, not its last.
        pooled: whether the UNet takes its pooled state, too.
        kinds: what its config.json may call its `model_type`.
        length: the most tokens that the pipeline gives it where nobody says; None: as many as its tokenizer says.
        optional: whether pipelines do without it.
        config: the name of transformers' class of its configuration.
        template: what stands around prompts (templates.py): nothing, what the "pipeline" says, or the tokenizer's
            "chat" template with the prompt as a user's only message.
    """

    folder: str
    tokenizer: str
    reader: str
    penultimate: bool = False
    pooled: bool = False
    kinds: tuple[str, ...] = ("clip_text_model", "clip")
    length: int | None = None
    optional: bool = False
    config: str = "CLIPTextConfig"
    template: Literal["", "pipeline", "chat"] = ""


@dataclass(frozen=True)
class Denoiser:
    """The network of a family that predicts the noise.

    Attributes:
        folder: of its weights.
        reader: the name of diffusers' class.
        wrapper: the module and the class in export/sources/denoisers that make a plain torch module of it.
        flow: whether it was trained by flow matching.
        steps: of its sampler, where nobody says.
        packed: how many latent pixels have their channels in its in_channels, where out_channels has those of one.
        even: whether the pipeline gives the sampler σ = 1, 1 − 1/steps, …, 1/steps, or leaves them to it.
    """

    folder: str = "unet"
    reader: str = "UNet2DConditionModel"
    wrapper: str = "unet.UNet"
    flow: bool = False
    steps: int = 28
    packed: int = 1
    even: bool = False


@dataclass(frozen=True)
class SingleFile:
    """A layout in which checkpoints of a family were published as one file.

    Attributes:
        name: for people.
        marker: a tensor of a text encoder by which it is known. diffusers' loader knows it by the same: where the
            tensor is missing, the loader takes the text encoder of the configuration.
        config: the hub's id of the model that has the configurations and tokenizers, which no file holds; diffusers
            would take them from there. None: files do not say what they predict, so that the user has to name it.
    """

    name: str
    marker: str
    config: str | None


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        name: for people.
        encoders: its text encoders, in the order of their ids.
        wrapper: the module and the class in export/sources/text that make one torch module of them.
        pipeline: the name of diffusers' class, as model_index.json has it: the class reads single files and LoRAs.
        same_pipelines: other classes that call the same UNet in the same way.
        single_files: the layouts.
        published: the γ that were published for its models.
        addition_embed_type: what the UNet's config.json says that it takes besides states; "text_time": a pooled state
            and time ids.
        optimum_inputs: what the UNet takes besides latents, timestep and states, in Optimum's graphs.
        denoiser: its UNet or transformer.
        guidance: the scale that its pipeline tells distilled models where nobody says.
        zeros_for_empty: whether ε_0 is of zeros, and not of the empty prompt's states, unless model_index.json says
            otherwise (force_zeros_for_empty_prompt).
    """

    name: str
    encoders: tuple[Encoder, ...]
    wrapper: str
    pipeline: str
    same_pipelines: tuple[str, ...]
    single_files: tuple[SingleFile, ...]
    published: tuple[Published, ...] = ()
    addition_embed_type: str | None = None
    optimum_inputs: tuple[str, ...] = ()
    zeros_for_empty: bool = False
    denoiser: Denoiser = Denoiser()
    guidance: float | None = None

    @property
    def modules(self) -> list[str]:
        """The folders of the modules whose weights are read."""
        return [self.denoiser.folder, *(encoder.folder for encoder in self.encoders)]

    @property
    def network(self) -> str:
        """What the denoiser is called in messages."""
        return "UNet" if self.denoiser.folder == "unet" else "transformer"

    @property
    def tokenizers(self) -> list[str]:
        """The folders of the tokenizers."""
        return [encoder.tokenizer for encoder in self.encoders]


# A pipeline for UNets that are told the guidance scale alone, and the scale that it tells where nobody says.
CONSISTENCY, CONSISTENCY_GUIDANCE = "LatentConsistencyModelPipeline", 8.5
T5 = Encoder("text_encoder", "tokenizer", "T5EncoderModel", kinds=("t5",), config="T5Config")
ARCHITECTURES = (
    Architecture(
        name="Stable Diffusion 1.x, 2.x",
        encoders=(Encoder("text_encoder", "tokenizer", "CLIPTextModel"),),
        wrapper="clip.OneTextEncoder",
        pipeline="StableDiffusionPipeline",
        same_pipelines=(
            "StableDiffusionImg2ImgPipeline",
            CONSISTENCY,
            "OnnxStableDiffusionPipeline",
            "ORTStableDiffusionPipeline",
        ),
        single_files=(
            SingleFile(
                "SD 1",
                "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
            ),
            SingleFile("SD 2", "cond_stage_model.model.token_embedding.weight", None),
        ),
        published=OF_STABLE_DIFFUSION,
        guidance=7.5,
    ),
    Architecture(
        name="SDXL",
        encoders=(
            Encoder("text_encoder", "tokenizer", "CLIPTextModel", penultimate=True),
            Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", penultimate=True, pooled=True),
        ),
        wrapper="clip.PairOfTextEncoders",
        pipeline="StableDiffusionXLPipeline",
        same_pipelines=("ORTStableDiffusionXLPipeline",),
        single_files=(
            SingleFile(
                "SDXL",
                "conditioner.embedders.1.model.positional_embedding",
                "stabilityai/stable-diffusion-xl-base-1.0",
            ),
        ),
        addition_embed_type="text_time",
        optimum_inputs=("text_embeds", "time_ids"),
        zeros_for_empty=True,
        guidance=5.0,
    ),
    Architecture(
        name="Stable Diffusion 3.x",
        encoders=(
            Encoder("text_encoder", "tokenizer", "CLIPTextModelWithProjection", penultimate=True, pooled=True),
            Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", penultimate=True, pooled=True),
            replace(T5, folder="text_encoder_3", tokenizer="tokenizer_3", length=256, optional=True),
        ),
        wrapper="sd3.SD3TextEncoders",
        pipeline="StableDiffusion3Pipeline",
        same_pipelines=("StableDiffusion3Img2ImgPipeline",),
        single_files=(),
        denoiser=Denoiser("transformer", "SD3Transformer2DModel", "sd3.SD3", flow=True),
    ),
    Architecture(
        name="Qwen-Image",
        encoders=(
            Encoder(
                "text_encoder",
                "tokenizer",
                "Qwen2_5_VLForConditionalGeneration",
                kinds=("qwen2_5_vl",),
                length=512,
                config="Qwen2_5_VLConfig",
                template="pipeline",
            ),
        ),
        wrapper="qwen.Qwen25VL",
        pipeline="QwenImagePipeline",
        same_pipelines=("QwenImageImg2ImgPipeline",),
        single_files=(),
        denoiser=Denoiser(
            *("transformer", "QwenImageTransformer2DModel", "qwen_image.QwenImage"),
            flow=True,
            steps=50,
            packed=4,
            even=True,
        ),
    ),
    Architecture(
        name="Z-Image",
        encoders=(
            Encoder(
                "text_encoder",
                "tokenizer",
                "Qwen3Model",
                kinds=("qwen3",),
                length=512,
                config="Qwen3Config",
                template="chat",
            ),
        ),
        wrapper="qwen.Qwen3",
        pipeline="ZImagePipeline",
        same_pipelines=("ZImageImg2ImgPipeline",),
        single_files=(),
        denoiser=Denoiser("transformer", "ZImageTransformer2DModel", "z_image.ZImage", flow=True, steps=50, even=True),
    ),
    Architecture(
        name="Flux.1",
        encoders=(
            Encoder("text_encoder", "tokenizer", "CLIPTextModel", pooled=True),
            replace(T5, folder="text_encoder_2", tokenizer="tokenizer_2", length=512),
        ),
        wrapper="flux.FluxTextEncoders",
        pipeline="FluxPipeline",
        same_pipelines=("FluxImg2ImgPipeline",),
        single_files=(),
        denoiser=Denoiser("transformer", "FluxTransformer2DModel", "flux.Flux", flow=True, even=True),
        guidance=3.5,
    ),
)


def wrapper(package: str, name: str) -> Any:
    """Return a class of ours, module.Class in a package of export/sources, imported only now: it needs torch."""
    module, _, kind = name.partition(".")
    return getattr(import_module(f"memedge.export.sources.{package}.{module}"), kind)


def architecture_of(names: Collection[str], kind: object = None) -> Architecture:
    """Return the family of a diffusers-format model, without the optional text encoders that it has not.

    Args:
        names: its files.
        kind: of the pipeline, as its model_index.json says. Transformers go by it. UNets go by their encoders: it is
            the family with most of them, all of them there, and where not even one is, the first one, of which
            something is then missing.
    """

    def has(encoder: Encoder) -> bool:
        return f"{encoder.folder}/config.json" in names

    for row in ARCHITECTURES:
        if row.denoiser.flow and kind in (row.pipeline, *row.same_pipelines):
            return replace(row, encoders=tuple(one for one in row.encoders if has(one) or not one.optional))
    found = [row for row in ARCHITECTURES if not row.denoiser.flow and all(map(has, row.encoders))]
    best = max(found, key=lambda row: len(row.encoders), default=ARCHITECTURES[0])
    return replace(best, guidance=CONSISTENCY_GUIDANCE) if kind == CONSISTENCY else best
