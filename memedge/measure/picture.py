"""The picture of `memedge bench`: time per prompt at a glance."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from memedge.engine import atomic
from memedge.pictures import COLOURS
from memedge.wording import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memedge.measure.latency import Bench, Case


def plot(bench: "Bench", path: Path) -> None:
    """Draw the median time per prompt of each case, with a whisker to the 95th percentile; write it to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    batches = list(dict.fromkeys(case.batch for case in bench.cases))
    draws = list(dict.fromkeys(case.draws for case in bench.cases))
    width = 0.8 / len(draws)
    for i, count in enumerate(draws):
        cases = [case for case in bench.cases if case.draws == count]
        places = [batches.index(case.batch) + (i - (len(draws) - 1) / 2) * width for case in cases]
        _bars(axes, cases, places, 0.92 * width, COLOURS[i % len(COLOURS)])
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlim(-0.6, len(batches) - 0.4)
    axes.margins(y=0.15)
    axes.set_xlabel("prompts per call")
    axes.set_ylabel("milliseconds per prompt")
    axes.legend(
        title="bar: median\nwhisker: 95th percentile",
        frameon=False,
        alignment="left",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    axes.spines[["top", "right"]].set_visible(False)
    title = f"{bench.checkpoint} on {bench.provider} {bench.precision}, {counted(bench.threads, 'thread')}"
    peak = "" if bench.gemm_gflops is None else f"; % of a float32 matrix product's {bench.gemm_gflops:.0f} GFLOP/s"
    # A checkpoint's name is not ours: a $ in it begins no formula.
    axes.set_title(f"{title}\n{bench.peak_memory_bytes / 1e6:.0f} MB at peak{peak}", fontsize=11, parse_math=False)
    content = BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=120)
    atomic.write(path, content.getvalue())


def _bars(axes: "Axes", cases: list["Case"], places: list[float], width: float, colour: str) -> None:
    median = [1e3 * case.p50_s / case.batch for case in cases]
    whisker = [1e3 * (case.p95_s - case.p50_s) / case.batch for case in cases]
    axes.bar(places, median, width, color=colour, label=counted(cases[0].draws, "draw"))
    axes.errorbar(places, median, [[0.0] * len(cases), whisker], fmt="none", ecolor="#333333", capsize=4)
    for case, place, height, above in zip(cases, places, median, whisker, strict=True):
        share = "" if case.gemm_fraction is None else f"\n{case.gemm_fraction:.0%}"
        top = (place, height + above)
        axes.annotate(f"{height:.3g}{share}", top, (0, 3), textcoords="offset points", ha="center", fontsize=9)
