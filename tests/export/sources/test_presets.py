"""Published γ: for the families that docs/methods.md §1 names, and for no other model."""

import pytest

from memedge.export.sources.presets import published


@pytest.mark.parametrize(
    ("name", "width", "pooled", "prediction", "gamma"),
    [
        ("CompVis/stable-diffusion-v1-4@133a221b", 768, 0, "epsilon", (1, 2)),
        ("stabilityai/stable-diffusion-2-base", 1024, 0, "epsilon", (1, 0.1)),
        ("stabilityai/stable-diffusion-2", 1024, 0, "v_prediction", (1, 0.1)),
        ("SG161222/Realistic_Vision_V5.1_noVAE", 768, 0, "epsilon", (2, 1)),
        ("realisticVisionV51_v51VAE.safetensors", 768, 0, "epsilon", (2, 1)),
        ("realistic vision for SD 2", 1024, 0, "epsilon", (1, 0.1)),
        ("stabilityai/stable-diffusion-xl-base-1.0", 2048, 1280, "epsilon", None),
        ("RealVisXL, realistic vision", 2048, 1280, "epsilon", None),
        ("a model of 768 with v", 768, 0, "v_prediction", None),
        ("emoji", 128, 0, "epsilon", None),
    ],
)
def test_released_weights(name, width, pooled, prediction, gamma):
    preset = published(name, width, pooled, prediction)
    assert (None if preset is None else (preset.gamma_norm, preset.gamma_alignment)) == gamma
