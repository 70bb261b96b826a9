"""The picture of `memedge bench`: time per prompt at a glance."""

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from memedge.engine import atomic
from memedge.engine.errors import InputError, MemedgeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from memedge.bench import Bench, Case

SUFFIXES = (".png", ".svg")
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # told apart by the colour-blind too


def check_plot(path: Path, option: str = "--plot") -> None:
    """Raise an error if no plot can be written to `path`, given with `option`, before anything is measured for it.

    Raises:
        InputError: another suffix than SUFFIXES, or a folder that is not there or is read-only.
        MemedgeError: matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{path} is no plot that can be drawn: name a file that ends in {' or '.join(SUFFIXES)}.")
    if path.is_dir():
        raise InputError(f"{path} is a directory: name a file for the plot.")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InputError(f"The folder of {path} does not exist: make it, or name another with {option}.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{folder} cannot be written to: name a file elsewhere with {option}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MemedgeError(
            "Plotting needs matplotlib, which is not installed: run `python -m pip install 'memedge[eval]'`."
        ) from None


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


def counted(number: int, thing: str) -> str:
    """Return how many things, in words."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
