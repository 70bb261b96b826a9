"""What an engine's screen does with known prompts: which clean ones it decides, and which memorized ones it misses."""

import numpy as np

from memedge.decision.rule import Rule
from memedge.decision.screen import screen
from memedge.engine.arrays import Bools
from memedge.engine.engine import Engine
from memedge.evaluation.figures import Figure, ScreenFigures
from memedge.metrics import binomial
from memedge.prompts.labelled import Sample


def screen_figures(engine: Engine, rule: Rule, sample: Sample, called: Bools) -> ScreenFigures:
    """Screen a sample, and count.

    Args:
        engine: the engine.
        rule: its rule, with a screen.
        sample: B prompts.
        called: bool [B], which the full rule calls memorized.
    """
    assert rule.screen is not None
    ids, size = sample.ids, engine.rows_per_call

    def passed(start: int) -> Bools:
        states = engine.encode(ids[start : start + size])
        return screen(engine, rule, states, lambda one: engine.encode(ids[start + one, None])).passed

    below = np.concatenate([passed(start) for start in range(0, len(ids), size)])
    found, clean = sample.memorized & called, ~sample.memorized
    missed, decided = int((below & found).sum()), int((below & clean).sum())
    return ScreenFigures(
        decided_prompts=decided,
        clean=int(clean.sum()),
        decided=Figure(*binomial(decided, int(clean.sum()))),
        missed_prompts=missed,
        found=int(found.sum()),
        missed=Figure(*binomial(missed, int(found.sum()))) if found.any() else None,
        alpha=rule.screen.alpha,
        passes=engine.draws * engine.directory.manifest.tap_share(rule.screen.tap),
    )
