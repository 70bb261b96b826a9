"""Published γ: for the families that docs/methods.md §1 names, and for no other model."""

import pytest

from memedge.export.sources.architectures import ARCHITECTURES
from memedge.export.sources.presets import preset_of, student_by

SD, SDXL = ARCHITECTURES[:2]


@pytest.mark.parametrize(
    ("family", "name", "width", "prediction", "gamma"),
    [
        (SD, "CompVis/stable-diffusion-v1-4@133a221b", 768, "epsilon", (1, 2)),
        (SD, "stabilityai/stable-diffusion-2-base", 1024, "epsilon", (1, 0.1)),
        (SD, "stabilityai/stable-diffusion-2", 1024, "v_prediction", (1, 0.1)),
        (SD, "SG161222/Realistic_Vision_V5.1_noVAE", 768, "epsilon", (2, 1)),
        (SD, "realisticVisionV51_v51VAE.safetensors", 768, "epsilon", (2, 1)),
        (SD, "realistic vision for SD 2", 1024, "epsilon", (1, 0.1)),
        (SDXL, "stabilityai/stable-diffusion-xl-base-1.0", 2048, "epsilon", None),
        (SDXL, "RealVisXL, realistic vision", 2048, "epsilon", None),
        (SD, "a model of 768 with v", 768, "v_prediction", None),
        (SD, "emoji", 128, "epsilon", None),
    ],
)
def test_released_weights(family, name, width, prediction, gamma):
    preset = preset_of(family.published, name, width, prediction)
    assert (None if preset is None else (preset.gamma_norm, preset.gamma_alignment)) == gamma


@pytest.mark.parametrize(
    ("name", "scheduler", "guidance", "by"),
    [
        ("CompVis/stable-diffusion-v1-4@133a221b", "PNDMScheduler", None, None),
        ("hyperrealistic + my-lora.safetensors:0.5", "EulerDiscreteScheduler", None, None),
        ("LCM_Dreamshaper_v7", "LCMScheduler", 8.5, "its guidance embedding"),
        ("a model", "LCMScheduler", None, "its LCMScheduler"),
        ("a model", "TCDScheduler", None, "its TCDScheduler"),
        ("stabilityai/sd-turbo@1", "EulerDiscreteScheduler", None, "'turbo' in its name"),
        ("sdxlTurbo_v1.safetensors", "EulerDiscreteScheduler", None, "'Turbo' in its name"),
        ("base + sdxl_lightning_4step_lora.safetensors:1", "EulerDiscreteScheduler", None, "'lightning' in its name"),
        ("base + Hyper-SD15-8steps-lora.safetensors:0.125", "DDIMScheduler", None, "'Hyper' in its name"),
        ("base + lcm-lora-sdv1-5.safetensors:1", "DDIMScheduler", None, "'lcm' in its name"),
    ],
)
def test_students(name, scheduler, guidance, by):
    """Models distilled to few steps, as far as they can be known."""
    assert student_by(name, scheduler, guidance) == by
