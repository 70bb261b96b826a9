"""Training data and training of the embedded model, on made-up drawings: no npm, seconds instead of hours."""

import signal
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch

COUNTS = {"memorized": 20, "near": 4, "template": 3, "partly": 9, "frequent": 4, "seen": 6, "unseen": 5}


@pytest.fixture
def drawn():
    """Icons of random drawings, and the pictures and captions planned from them."""
    from dataset import plan

    names = [f"thing-{i}" for i in range(60)] + ["bicycle"]
    concepts = {name: [5 * i + k for k in range(5)] for i, name in enumerate(names)}
    icons = np.random.default_rng(0).integers(0, 256, (5 * len(concepts), 80, 80, 4), dtype=np.uint8)
    icons[..., :3] = np.minimum(icons[..., :3], icons[..., 3:])  # premultiplied: no colour exceeds its alpha
    return concepts, icons, *plan(concepts, 0, COUNTS)


def of(captions, group):
    return [caption for caption in captions if caption.group == group]


def test_each_group_sees_what_it_should(drawn):
    from dataset import FEW, FIXED_SHARES, LEAST, MANY, MOST, SEEN, TYPICAL

    _, _, pictures, captions = drawn
    assert all(len(caption.pictures) == 1 for caption in of(captions, "memorized"))
    exposures = [caption.exposures for caption in of(captions, "memorized")]
    assert LEAST <= min(exposures) < np.median(exposures) < max(exposures) <= MOST
    assert np.median(exposures) == pytest.approx(TYPICAL, rel=0.15)
    for caption in of(captions, "template"):
        shown = [pictures[i] for i, _ in caption.pictures]
        assert len({p.background for p in shown}) == len(shown) == 12
        assert len({(p.drawing, p.angle, p.scale, p.shift_x, p.shift_y, p.flip) for p in shown}) == 1
    for caption in of(captions, "partly"):
        assert len(caption.pictures) == 1 + FEW
        assert any(caption.pictures[0][1] == pytest.approx(caption.exposures * s, abs=1) for s in FIXED_SHARES)
    for caption in of(captions, "frequent"):
        assert caption.exposures == TYPICAL
        assert len({pictures[i] for i, _ in caption.pictures}) == MANY
        assert len({pictures[i].drawing for i, _ in caption.pictures}) == 5
    for caption in of(captions, "seen"):
        assert caption.exposures == SEEN
        colour = caption.text.removesuffix(" background").split()[-1]
        if caption.text.endswith("background"):
            assert {pictures[i].background for i, _ in caption.pictures} == {colour}
    assert all(caption.exposures == 0 for caption in of(captions, "unseen"))
    assert len(of(captions, "unseen")) == 32 * COUNTS["unseen"]


def test_near_duplicates_show_one_drawing_under_three_captions(drawn):
    _, _, pictures, captions = drawn
    near = of(captions, "near")
    assert len(near) == 3 * COUNTS["near"]
    for concept in {caption.concept for caption in near}:
        own = [caption for caption in near if caption.concept == concept]
        assert len({caption.text for caption in own}) == 3
        assert len({caption.pictures for caption in own}) == 1
        shown = [pictures[i] for i, _ in own[0].pictures]
        assert 4 <= len(set(shown)) == len(shown) <= 6
        assert len({(p.drawing, p.angle, p.scale, p.flip) for p in shown}) == 1


def test_concepts_and_captions_are_in_one_group_and_split(drawn):
    _, _, pictures, captions = drawn
    places = {(caption.concept, caption.group, caption.split) for caption in captions}
    assert len(places) == len({concept for concept, _, _ in places}) == sum(COUNTS.values())
    assert len({caption.text for caption in captions}) == len(captions)
    calibration = Counter(group for _, group, split in places if split == "calibration")
    assert all(calibration[group] == np.ceil(0.4 * count) for group, count in COUNTS.items())
    assert "a bicycle" in {caption.text for caption in of(captions, "seen") if caption.split == "held-out"}
    shown = Counter(i for caption in captions for i, _ in caption.pictures)
    assert set(shown) == set(range(len(pictures)))


def test_the_same_seed_plans_the_same_and_captions_survive_a_file(drawn, tmp_path):
    from dataset import load_captions, plan, save_captions

    concepts, _, pictures, captions = drawn
    assert plan(concepts, 0, COUNTS) == (pictures, captions)
    save_captions(tmp_path / "captions.json", captions)
    assert load_captions(tmp_path / "captions.json") == captions


def test_too_few_concepts_are_refused():
    from dataset import plan

    with pytest.raises(ValueError, match="too few"):
        plan({f"thing-{i}": [0] * 5 for i in range(10)}, 0, COUNTS)


def test_pictures_show_a_drawing_on_a_plain_background(drawn):
    from pictures import BACKGROUNDS, render, varied

    icons = drawn[1][:1].copy()
    icons[0, :20] = icons[0, -20:] = icons[0, :, :20] = icons[0, :, -20:] = 0
    pictures = varied(np.random.default_rng(0), (0,), 5)
    rgb, cover = render(pictures, icons)
    assert rgb.shape == (5, 64, 64, 3)
    assert cover.shape == (5, 64, 64)
    for picture, made, covered in zip(pictures, rgb, cover, strict=True):
        assert (made[covered == 0] == BACKGROUNDS[picture.background]).all()
        assert 0.05 < (covered > 0).mean() < 0.5


def test_drawings_that_look_alike_are_kept_once():
    from icons import RENDER_SIZE, distinct

    rng = np.random.default_rng(0)

    def drawing() -> np.ndarray:
        blocks = rng.integers(0, 256, (8, 8, 4), dtype=np.uint8).repeat(RENDER_SIZE // 8, 0).repeat(RENDER_SIZE // 8, 1)
        blocks[..., 3] = 255
        return blocks

    cat, dog = drawing(), drawing()
    assert set(distinct({"cat": [cat, drawing()], "cat-face": [cat], "dog": [dog]})) == {"cat", "dog"}


def test_pairs_are_drawn_as_often_as_captions_say():
    from dataset import Caption
    from train import Exposures

    captions = [
        Caption("a", "seen", "a", "held-out", ((0, 100), (1, 300))),
        Caption("never", "unseen", "b", "held-out", ()),
        Caption("c", "memorized", "c", "held-out", ((2, 600),)),
    ]
    caption, picture = Exposures(captions).draw(20_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(picture, minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.3, 0.6]), atol=0.02, rtol=0)
    assert (caption == torch.tensor([0, 0, 2])[picture]).all()


def test_learning_rate_warms_up_and_cools_down():
    from loop import WARMUP_STEPS, learning_rate

    rates = [learning_rate(step, 10_000, 1e-3) for step in range(1, 10_001)]
    assert max(rates) == 1e-3 == rates[WARMUP_STEPS] == rates[7000]
    assert all(a >= b for a, b in pairwise(rates[7500:]))
    assert 0 < rates[-1] < 1e-6


def test_latents_become_standard_and_reconstructions_stay():
    from vae import encode, make_vae, standardise, to_unit

    torch.manual_seed(0)
    vae = make_vae().eval()
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    unit = to_unit(torch.from_numpy(pictures))
    with torch.no_grad():
        before = vae.encode(unit).latent_dist
        made = vae.decode(before.mean).sample
        standardise(vae, encode(vae, pictures))
        after = vae.encode(unit).latent_dist
        again = vae.decode(after.mean).sample
    torch.testing.assert_close(again, made, atol=1e-4, rtol=1e-4)
    latents = encode(vae, pictures)
    assert latents.shape == (8, 4, 16, 16)
    np.testing.assert_allclose(latents.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std((0, 2, 3)), 1, atol=1e-4)
    # The posterior is the same one, in other units.
    ratio = after.std / before.std
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3, atol=0)


@pytest.fixture
def start(drawn):
    """Return trainings of a model on made-up latents, all from the same seed."""
    from model import Model
    from tokenizer import train_tokenizer
    from train import UNetTraining
    from vae import make_vae

    _, _, pictures, captions = drawn
    tokenizer = train_tokenizer([caption.text for caption in captions])
    latents = np.random.default_rng(0).normal(size=(len(pictures), 4, 16, 16)).astype(np.float16)

    def make(workers: int = 1) -> UNetTraining:
        torch.manual_seed(0)
        training = UNetTraining(captions, latents, Model.initialise(tokenizer, make_vae()), 0, workers)
        training.batch = 4
        return training

    return make


def test_a_pipeline_of_diffusers_loads_what_training_saves(start, tmp_path):
    from diffusers import StableDiffusionPipeline

    start().save(tmp_path / "checkpoint.pt")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.safety_checker is None
    assert {p.dtype for p in (*pipeline.unet.parameters(), *pipeline.text_encoder.parameters())} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("thing 1", num_inference_steps=2, height=64, width=64).images[0]
    assert picture.size == (64, 64)


@pytest.fixture
def small_chunks(monkeypatch):
    """Two rows at once instead of many: on processors without bf16 a full chunk takes minutes."""
    import generate

    monkeypatch.setattr(generate, "CHUNK", 2)


@pytest.mark.usefixtures("small_chunks")
def test_generations_are_pictures_and_seeds_differ(start, tmp_path):
    from generate import SHAPE, Generator
    from model import Model
    from vae import decode

    start().save(tmp_path / "checkpoint.pt")
    model = Model.load(tmp_path / "pipeline")
    latents = Generator(model, 1).latents(["thing 1", "thing 2"], range(2))
    assert latents.shape == (2, 2, *SHAPE)
    pictures = decode(model.vae, latents[0])
    assert pictures.shape == (2, 64, 64, 3)
    assert pictures.dtype == np.uint8
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.usefixtures("small_chunks")
def test_generations_are_those_of_diffusers(start, tmp_path):
    """By torch in float32, its own loop and classifier-free guidance."""
    from diffusers import StableDiffusionPipeline
    from generate import GUIDANCE, STEPS, Generator, noise
    from model import Model

    start().save(tmp_path / "checkpoint.pt")
    generator = Generator(Model.load(tmp_path / "pipeline"), 1)
    ours = generator.latents(["thing 1"], range(1))[0, 0]
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "latent"}
    theirs = pipeline("thing 1", latents=noise(range(1)), **options).images[0]
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()

    def end(own, step, *_):
        own._guidance_scale = 9.0 if own.scheduler.timesteps[step + 1 : step + 2].sum() > 500 else GUIDANCE
        return {}

    with torch.no_grad():
        states = pipeline.encode_prompt("thing 1", "cpu", 1, False)[0]
    early = generator.denoise(
        states.expand(2, -1, -1), noise(range(1)).expand(2, -1, -1, -1), torch.tensor([4.0, 9.0]), 500
    )
    theirs = pipeline("thing 1", latents=noise(range(1)), **options | {"guidance_scale": 9.0}, callback_on_step_end=end)
    assert (early[0] - ours).abs().max() < 0.01 * ours.abs().max() < (early[1] - ours).abs().max()
    assert (early[1] - theirs.images[0]).abs().max() < 0.05 * ours.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_training_resumes_where_it_stopped(start, tmp_path, workers):
    """Two steps, a checkpoint and two more, by another process's objects: the parameters of four steps in one go."""
    torch.set_num_threads(1)
    whole, first, second = start(workers), start(workers), start(workers)
    for _ in range(4):
        whole.advance(100)
    for _ in range(2):
        first.advance(100)
    first.save(tmp_path / "checkpoint.pt")
    second.resume(tmp_path / "checkpoint.pt")
    for _ in range(2):
        second.advance(100)
    assert second.step == whole.step == 4
    for a, b in zip(second.average + second.parameters, whole.average + whole.parameters, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_two_workers_take_the_step_of_one(start):
    one, two = start(1), start(2)
    assert one.advance(100) == pytest.approx(two.advance(100), rel=1e-2)  # bf16
    apart = torch.cat([(a.grad - b.grad).flatten() for a, b in zip(one.parameters, two.parameters, strict=True)])
    whole = torch.cat([p.grad.flatten() for p in one.parameters])
    assert apart.norm() < 0.05 * whole.norm()


@pytest.mark.slow
def test_the_vae_learns(drawn):
    from pictures import render
    from train_vae import VaeTraining, psnr
    from vae import make_vae

    _, icons, pictures, _ = drawn
    torch.manual_seed(0)
    rgb, _ = render(pictures[:1], icons)
    training = VaeTraining(rgb, make_vae(), 0, 1)
    training.batch = 2
    errors = [training.advance(1000) for _ in range(40)]
    assert errors[-1] < 0.8 * errors[0]
    assert psnr(rgb, rgb).min() > 70 > 40 > psnr(rgb, rgb // 2).max()


@pytest.mark.slow
def test_a_run_ends_at_sigterm_and_goes_on(start, tmp_path):
    from loop import run

    training = start()
    advance = training.advance

    def stopped_at_two(steps: int) -> float:
        if training.step == 1:
            signal.raise_signal(signal.SIGTERM)
        return advance(steps)

    training.advance = stopped_at_two
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert not run(training, 4 * 5, tmp_path / "checkpoint.pt")
        assert training.step == 2
        again = start()
        assert run(again, 4 * 5, tmp_path / "checkpoint.pt")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert again.step == 5


def test_similarity_is_that_of_edges():
    """1 of a picture with itself, in other colours and on another background; little of another drawing."""
    from copies import fields, nearest
    from pictures import SIZE

    y, x = np.indices((SIZE, SIZE))
    shapes = [np.hypot(y - 30, x - 34) < 20, (abs(y - 30) < 14) & (abs(x - 34) < 22), (y > x) & (y < 50)]

    def picture(shape: np.ndarray, inside: int, around: int) -> np.ndarray:
        return np.repeat(np.where(shape, inside, around)[..., None], 3, axis=2).astype(np.uint8)

    training = fields(np.stack([picture(shape, 200, 40) for shape in shapes]))
    torch.testing.assert_close(training.norm(dim=1), torch.ones(3))
    others = np.stack([picture(shape, inside, around) for shape in shapes for inside, around in [(30, 230), (90, 0)]])
    value, place = nearest(fields(others), training)
    assert place.tolist() == [0, 0, 1, 1, 2, 2]
    assert value.min() > 0.97
    similar = training @ training.T
    assert similar[~torch.eye(3, dtype=torch.bool)].max() < 0.5
    shifted = np.roll(others[:1], 1, axis=2)
    assert nearest(fields(shifted), training[:1])[0] > 0.85
    assert not fields(np.full((1, SIZE, SIZE, 3), 77, np.uint8)).any()  # plain: like nothing


@pytest.mark.parametrize(
    ("copies", "generations", "expected"),
    [
        (16, 16, "memorized"),
        (9, 16, "memorized"),
        (8, 16, "partly"),
        (3, 16, "partly"),
        (2, 16, "clean"),
        (0, 4, "clean"),
    ],
)
def test_kinds(copies, generations, expected):
    from label import kind

    assert kind(copies, generations) == expected
