"""An evaluation of made-up scores: everything that a report shows, without an engine."""

import numpy as np

from memedge.evaluation.figures import (
    EvaluatedDetector,
    Evaluation,
    EvaluationRun,
    Measured,
    PromptFile,
    Rule,
    ScoredPrompt,
    find,
)

# Prompts that would be markup, scripts, templates or formulas if anything took them for that.
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 1'>",
    '"><a href="https://example.com/">a & b</a><!--',
    "$title ${sections} %{x} {{ 1 }} \\u003c",
    "a very long prompt, " * 60,
    "ein Prüfstein \u2028 für 絵文字 🌋",
)


def evaluation(
    memorized: int = 20,
    clean: int = 130,
    draws: int = 4,
    counts: tuple[int, ...] = (1, 4),
    threshold: float | None = 2.2,
) -> Evaluation:
    """Return an evaluation of three detectors; the hostile prompts are the first memorized ones, with high scores."""
    generator = np.random.default_rng(7)
    label = np.arange(memorized + clean) < memorized
    size = (memorized + clean, draws)
    norm = 1 + label[:, None] + 0.3 * generator.normal(size=(len(label), 1)) + 0.1 * generator.normal(size=size)
    alignment = 0.1 * label[:, None] + 0.08 * generator.normal(size=size)
    norm[: len(HOSTILE)] += 1
    found = {"anisotropy": (norm + 2 * alignment, 2.0), "norm": (norm, 1.0), "alignment": (alignment, 1.0)}
    measured = [Measured(name, f"a formula of {name}", cost, v, 0.01 * cost) for name, (v, cost) in found.items()]
    rule = Rule(1.0, -2.0, source="not fitted" if threshold is None else "calibrated", threshold=threshold)
    shown = {one.name: -one.values if one.name == "alignment" else one.values for one in measured}  # as measured
    texts = [*HOSTILE, *(f"prompt {i}" for i in range(len(HOSTILE), len(label)))]
    return Evaluation(
        run=EvaluationRun(
            command="memedge evaluate engine --memorized 'a&b.txt' --clean c.txt -o report",
            date="2026-11-22T12:00:00+00:00",
            engine="<engine>",
            checkpoint="<b>checkpoint</b>",
            checkpoint_sha256="0" * 64,
            engine_fingerprint="1" * 64,
            provider="cpu",
            precision="fp32",
            threads=2,
            timesteps=(981, 41),
            draws=1,
            noise_seed=42,
            seed=None,
            versions={"memedge": "0"},
        ),
        memorized=PromptFile("a&b.txt", "2" * 64, memorized, memorized),
        clean=PromptFile("c.txt", "3" * 64, clean, clean),
        cautions=["Mind <this>."],
        rule=rule,
        lower=("alignment",),
        terms=("norm", "alignment"),
        detectors=[EvaluatedDetector(one.name, one.formula, one.passes, one.seconds) for one in measured],
        findings=find(measured, label, counts, counts[0], rule),
        prompts=[
            ScoredPrompt(text, bool(kind), False, {name: values[place].tolist() for name, values in shown.items()})
            for place, (text, kind) in enumerate(zip(texts, label, strict=True))
        ],
    )
