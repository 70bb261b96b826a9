"""The search against Adam on the published loss, written plainly; and that starts do not see each other."""

import pytest
import torch
from audited import make_whole_checkpoint
from diffusers import DDPMScheduler, UNet2DConditionModel

from memedge.audit.search import DRAWS, RATE, EmbeddingSearch, seed_of, starts_of
from memedge.autograd.diffusion_model import DiffusionModel


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def whole(request, tmp_path_factory):
    folder = make_whole_checkpoint(tmp_path_factory.mktemp("whole") / "model", request.param)
    return folder, DiffusionModel(str(folder))


def test_steps_are_adams_on_the_published_loss(whole):
    folder, model = whole
    latents = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(1))
    start = model.encode(["a house"])
    search = EmbeddingSearch(model, latents, start, 7, 3)
    losses = [search.step().item() for _ in range(3)]

    # The same by diffusers' own schedule and targets, the whole batch at once.
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    schedule = DDPMScheduler.from_pretrained(folder / "scheduler")
    embedding = start.clone().requires_grad_()
    adam = torch.optim.Adam([embedding], lr=RATE)
    generator = torch.Generator().manual_seed(7)
    for expected in losses:
        noise = torch.randn(DRAWS, *model.shape, generator=generator)
        timesteps = torch.randint(1000, (DRAWS,), generator=generator)
        repeated = latents.expand(DRAWS, -1, -1, -1)
        noisy = schedule.add_noise(repeated, noise, timesteps)
        of_v = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(repeated, noise, timesteps) if of_v else noise
        loss = (unet(noisy, timesteps, embedding.expand(DRAWS, -1, -1)).sample - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert expected == pytest.approx(loss.item(), rel=1e-4)
    # Adam's first steps are ± the rate, so where a gradient is about 0 its sign is rounding's.
    difference = (search.embeddings - embedding).abs()
    assert difference.median() < 1e-4
    assert (difference > 1e-2).float().mean() < 0.02


def test_starts_do_not_see_each_other(whole):
    _, model = whole
    latents = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(1))
    starts = torch.cat([model.encode(["a"]), model.encode(["b"])])
    both = EmbeddingSearch(model, latents, starts, 3, 16)
    both.step()
    changed = EmbeddingSearch(model, latents, torch.cat([starts[:1], starts[1:] * 2]), 3, 16)
    changed.step()
    torch.testing.assert_close(both.embeddings[0], changed.embeddings[0], rtol=0, atol=1e-5)
    assert not torch.allclose(both.embeddings[1], changed.embeddings[1])


def test_starts(whole):
    _, model = whole
    starts = starts_of(model, "a house", 1)
    states = model.encode(["a house"])[0]
    assert list(starts) == ["caption", "perturbed", "random"]
    torch.testing.assert_close(starts["caption"], states)
    assert float((starts["perturbed"] - states).std()) == pytest.approx(float(states.std()) / 2, rel=0.1)
    assert float(starts["random"].std()) == pytest.approx(float(model.empty.std()), rel=0.1)
    assert list(starts_of(model, None, 1)) == ["random"]
    assert not torch.equal(starts["random"], starts_of(model, None, 2)["random"])


def test_seeds_are_a_pictures_own():
    assert seed_of(0, "a.png") == seed_of(0, "a.png")
    assert len({seed_of(0, "a.png"), seed_of(1, "a.png"), seed_of(0, "b.png")}) == 3
