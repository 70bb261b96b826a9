"""A node of ComfyUI that loads the embedded engine's model, for tests and pictures: ComfyUI's own loader refuses it."""

from typing import Any

import comfyui
import torch
from diffusers import AutoencoderKL


class EmojiCLIP:
    """What CLIPTextEncode asks of a CLIP."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> Any:
        return comfyui.conditioning(tokens)


class EmojiVAE:
    """What VAEDecode asks of a VAE."""

    def decode(self, samples: Any) -> Any:
        with torch.no_grad():
            images = AutoencoderKL.from_pretrained(comfyui.EMOJI / "vae").decode(samples).sample
        return (images.movedim(1, -1) / 2 + 0.5).clamp(0, 1)


class EmojiLoader:
    CATEGORY, FUNCTION, RETURN_TYPES = "loaders", "load", ("MODEL", "CLIP", "VAE")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def load(self) -> tuple[Any, Any, Any]:
        return comfyui.model(), EmojiCLIP(), EmojiVAE()


NODE_CLASS_MAPPINGS = {"EmojiLoader": EmojiLoader}
NODE_DISPLAY_NAME_MAPPINGS = {"EmojiLoader": "Load memedge's embedded model"}
