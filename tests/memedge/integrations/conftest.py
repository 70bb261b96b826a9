"""Random models, with detectors that know which of four prompts are memorized to them."""

import shutil

import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from guarded import Model, calibrate, make_pipe
from pipelines import make

from memedge.export.export import export


@pytest.fixture(scope="session")
def model(checkpoint, engine, tmp_path_factory):
    calibrated = shutil.copytree(engine, tmp_path_factory.mktemp("calibrated") / "engine")
    return Model(make_pipe(StableDiffusionPipeline, checkpoint), *calibrate(calibrated))


@pytest.fixture
def small(model, checkpoint):
    """The random model, with its own scheduler, and without a hook on its UNet before and after."""
    model.pipe.scheduler = DDIMScheduler.from_pretrained(checkpoint / "scheduler")
    assert not model.pipe.unet._forward_hooks
    yield model
    assert not model.pipe.unet._forward_hooks


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory):
    """A random SDXL model."""
    folder = tmp_path_factory.mktemp("sdxl")
    checkpoint = make(folder / "checkpoint", "sdxl")
    export(checkpoint, folder / "engine")
    return Model(make_pipe(StableDiffusionXLPipeline, checkpoint), *calibrate(folder / "engine"))
