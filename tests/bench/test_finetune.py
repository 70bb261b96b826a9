"""Fine-tuning arms on a random model and made-up latents: they draw the same, and learn from what they should."""

import numpy as np
import pytest
import torch

STEPS = 2


@pytest.fixture
def arm():
    """Return arms, all from the same model and seed."""
    from dataset import Caption
    from finetune import FineTuning
    from model import Model
    from targets import Pairs, encode_captions
    from tokenizer import train_tokenizer
    from vae import make_vae

    tokenizer = train_tokenizer(["thing one", "thing two"])
    ordinary = [Caption("thing one", "seen", "one", "held-out", ((0, 3), (1, 2)))]
    latents = np.random.default_rng(0).normal(size=(2, 4, 16, 16)).astype(np.float16)

    def make(targets=None, left_out=None) -> FineTuning:
        torch.manual_seed(0)
        model = Model.initialise(tokenizer, make_vae())
        pairs = Pairs(encode_captions(model, ["thing two"]), torch.ones(1, 4, 16, 16))
        return FineTuning(model, pairs, ordinary, latents, STEPS, 1e-3, 0, targets, left_out)

    return make


def test_arms_draw_the_same_and_half_is_duplicated(arm):
    first, second = arm().draw(), arm(targets=1.0).draw()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert (first[1][:8] == 1).all()
    assert (first[1][8:] != 1).any((1, 2, 3)).all()


@pytest.mark.slow
def test_random_leaves_out_as_many_in_each_step(arm):
    left_out = torch.rand(STEPS, 16, generator=torch.manual_seed(0)) < 0.3
    left_out[1] = True
    training = arm(left_out=left_out)
    for step in range(STEPS):
        training.advance(STEPS)
        assert training.left_out[step].sum() == left_out[step].sum()
        learnt = any(parameter.grad.any() for parameter in training.parameters)
        assert learnt == (not left_out[step].all())
    assert (training.left_out != left_out).any()


@pytest.mark.slow
def test_a_target_leaves_out_what_reaches_it(arm):
    training = arm(targets=1e-9)
    training.advance(STEPS)
    assert training.left_out[0].all()


def test_shares_of_what_targets_leave_out():
    from targets import JUDGED_AT, Targets, judge

    memorized, clean = np.full((len(JUDGED_AT), 1, 4), 3.0), np.tile([0.5, 0.5, 0.5, 2.5], (len(JUDGED_AT), 1, 1))
    each = np.full(1000, 5.0)
    each[981] = 2.0
    first, *rest = judge(Targets(2.6, each), memorized, clean)
    assert (first.memorized_one, first.memorized_each, first.clean_one, first.clean_each) == (1, 1, 0, 0.25)
    assert all((row.memorized_each, row.clean_each, row.auc) == (0, 0, 1) for row in rest)
