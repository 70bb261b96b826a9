"""The families of models: what depends on which of them a checkpoint belongs to stands in one row of a table.

A new family is a row here, and what is truly new about it: a module that makes its states (text_encoders.py), and what
its UNet is given besides (torch_checkpoint.py, optimum_graphs.py). Classes are named, and imported where they are
needed: what is downloaded from a hub is known without torch. Whether prompts begin with BOS, engines see in their
tokenizers (engine/tokenizer.py).
"""

from collections.abc import Collection
from dataclasses import dataclass

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
    """

    folder: str
    tokenizer: str
    reader: str
    penultimate: bool = False
    pooled: bool = False
    kinds: tuple[str, ...] = ("clip_text_model", "clip")


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
        wrapper: the name of our class (text_encoders.py) that makes one torch module of them.
        pipeline: the name of diffusers' class, as model_index.json has it: the class reads single files and LoRAs.
        same_pipelines: other classes that call the same UNet in the same way.
        single_files: the layouts.
        published: the γ that were published for its models.
        addition_embed_type: what the UNet's config.json says that it takes besides states; "text_time": a pooled state
            and time ids.
        optimum_inputs: what the UNet takes besides latents, timestep and states, in Optimum's graphs.
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

    @property
    def modules(self) -> list[str]:
        """The folders of the modules whose weights are read."""
        return ["unet", *(encoder.folder for encoder in self.encoders)]

    @property
    def tokenizers(self) -> list[str]:
        """The folders of the tokenizers."""
        return [encoder.tokenizer for encoder in self.encoders]


ARCHITECTURES = (
    Architecture(
        name="Stable Diffusion 1.x, 2.x",
        encoders=(Encoder("text_encoder", "tokenizer", "CLIPTextModel"),),
        wrapper="OneTextEncoder",
        pipeline="StableDiffusionPipeline",
        same_pipelines=(
            "StableDiffusionImg2ImgPipeline",
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
    ),
    Architecture(
        name="SDXL",
        encoders=(
            Encoder("text_encoder", "tokenizer", "CLIPTextModel", penultimate=True),
            Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", penultimate=True, pooled=True),
        ),
        wrapper="PairOfTextEncoders",
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
    ),
)


def architecture_of(names: Collection[str]) -> Architecture:
    """Return the family of a diffusers-format model, given its files: that with most text encoders, all of them there.

    Where not even one is, it is the first family, of which something is then missing.
    """
    found = [row for row in ARCHITECTURES if all(f"{encoder.folder}/config.json" in names for encoder in row.encoders)]
    return max(found, key=lambda row: len(row.encoders), default=ARCHITECTURES[0])
