"""The flow-matching model beside the embedded one: an MMDiT in Stable Diffusion 3's format, on the same latents.

    python bench/tiny/flow_model.py PIPELINE_DIR      # the trained one, as a pipeline of diffusers

Its text encoders are the embedded model's own, twice and frozen: Stable Diffusion 3 takes the last but one states of
two, and of the second and the first the pooled ones. There is no third one, so that the pipeline puts zeros in its
place: call it with max_sequence_length=16, the zeros that it was trained with.
"""

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from model import put
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from vae import LATENT_CHANNELS, LATENT_SIZE, load_vae

EMOJI, TRANSFORMER = Path(__file__).parent / "emoji", Path(__file__).parent / "flow_transformer"
WIDTH, LAYERS, HEADS = 128, 6, 4
TOKENS = 16  # of a text encoder; the longest caption has 13
SHIFT = 2.0  # of the noise levels, in training and in generation; Stable Diffusion 3, of larger pictures, has 3


@dataclass
class FlowModel:
    transformer: SD3Transformer2DModel
    text_encoder: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL

    @staticmethod
    def initialise() -> "FlowModel":
        """Return an untrained transformer with the text encoder, tokenizer and VAE of the embedded model."""
        text_encoder = _with_projection(CLIPTextModel.from_pretrained(EMOJI / "text_encoder", dtype=torch.float32))
        width = 2 * text_encoder.config.hidden_size
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=LAYERS,
            attention_head_dim=WIDTH // HEADS,
            num_attention_heads=HEADS,
            joint_attention_dim=width,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=width,
            pos_embed_max_size=LATENT_SIZE // 2,
            qk_norm="rms_norm",
        )
        tokenizer = CLIPTokenizer.from_pretrained(EMOJI / "tokenizer", model_max_length=TOKENS)
        return FlowModel(transformer, text_encoder, tokenizer, load_vae(EMOJI / "vae"))

    @staticmethod
    def trained() -> "FlowModel":
        """Return the model that is kept here: the transformer alone is, the other parts are the embedded model's."""
        model = FlowModel.initialise()
        model.transformer = SD3Transformer2DModel.from_pretrained(TRANSFORMER, torch_dtype=torch.float32).eval()
        return model

    @staticmethod
    def load(folder: Path) -> "FlowModel":
        """Load a pipeline's folder for generation on the CPU, in fp32."""
        return FlowModel(
            SD3Transformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32).eval(),
            CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval(),
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            load_vae(folder / "vae"),
        )

    def save(self, folder: Path) -> None:
        """Write a folder that `StableDiffusion3Pipeline.from_pretrained` loads, in half precision; make this model so.

        That has to be told that there is no third text encoder, by text_encoder_3=None and tokenizer_3=None. The folder
        replaces an older one only once it is complete.
        """
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        self.vae.register_to_config(shift_factor=0.0)  # without it the pipeline cannot decode
        pipeline = StableDiffusion3Pipeline(
            transformer=self.transformer.half(),
            scheduler=scheduler(),
            vae=self.vae.half(),
            text_encoder=self.text_encoder.half(),
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder,
            tokenizer_2=self.tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        pipeline.save_pretrained(partial)
        put(partial, folder, ("text_encoder", "text_encoder_2"))

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return states [B, 32, D] and pooled states [B, D], as the pipeline makes them."""
        encoded = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        text = self.text_encoder(input_ids=encoded["input_ids"], output_hidden_states=True)
        states = text.hidden_states[-2].repeat(1, 1, 2)
        return torch.cat([states, torch.zeros_like(states)], dim=1), text.text_embeds.repeat(1, 2)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the noise levels of the model, as Stable Diffusion 3's are but for the shift."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def _with_projection(text_encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Return a text encoder whose pooled states are not changed by the projection."""
    config = CLIPTextConfig.from_dict({**text_encoder.config.to_dict(), "architectures": None})
    projected = CLIPTextModelWithProjection(config)
    known = projected.load_state_dict(
        {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text_encoder.state_dict().items()},
        strict=False,
    )
    if known.unexpected_keys or known.missing_keys != ["text_projection.weight"]:
        raise ValueError(f"the text encoder is of another kind: {known}")
    with torch.no_grad():
        projected.text_projection.weight.copy_(torch.eye(config.hidden_size))
    return projected.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    FlowModel.trained().save(parser.parse_args().pipeline)


if __name__ == "__main__":
    main()
