"""`memedge bench`: what scoring costs here."""

from typing import TYPE_CHECKING, Annotated

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    DrawsOption,
    EngineOption,
    JsonOption,
    PlotOption,
    PrecisionOption,
    ProviderOption,
    ThreadsOption,
    app,
    counts,
)

if TYPE_CHECKING:
    from memedge.measure.latency import Bench


@app.command()
def bench(
    batch: Annotated[
        str, typer.Option("--batch", metavar="B,...", help="Prompts per call, one or several.")
    ] = "1,4,16",
    draws: DrawsOption = None,
    output: PlotOption = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Measure what scoring costs here: time, memory, throughput.

    Every case is timed after one call that is reported apart, for 200 calls or 10 seconds.
    """
    batches, several = counts(batch, "--batch"), counts(draws, "--draws") if draws is not None else None
    if output:
        from memedge.pictures import check_plot

        check_plot(output)
    from memedge.measure.latency import measure

    with terminal.progress_bar("measuring") as progress:
        result = measure(engine, provider, precision, threads, batches, several, progress)
    terminal.print_json(result) if json else print_bench(result)
    if output:
        from memedge.measure.picture import plot

        plot(result, output)


def print_bench(bench: "Bench") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, collapse_padding=True)
    heads = "batch draws calls first,ms p50,ms p95,ms p99,ms prompts,/s GFLOP of,peak host,µs host,share"
    for name in heads.split():
        table.add_column(name.replace(",", "\n"), justify="right", no_wrap=True)
    for c in bench.cases:
        table.add_row(
            *(str(count) for count in (c.batch, c.draws, c.calls)),
            *(terminal.short(1e3 * seconds) for seconds in (c.first_call_s, c.p50_s, c.p95_s, c.p99_s)),
            terminal.short(c.prompts_per_s),
            terminal.short(c.flops_per_prompt / 1e9),
            "—" if c.gemm_fraction is None else f"{c.gemm_fraction:.0%}",
            f"{c.host_us:.0f}",
            f"{c.host_fraction:.1%}",
        )
    terminal.print_table(table)
    terminal.say(
        f"{bench.checkpoint} on {bench.provider}, {bench.precision}, threads: {bench.threads}. Loaded in "
        f"{bench.load_s:.2f} s, {bench.peak_memory_bytes / 1e6:.0f} MB at peak. Times are per call, GFLOP per prompt, "
        "host is what a call spends outside the model."
    )
    load = "unknown" if bench.load is None else f"{bench.load:.2g}"
    terminal.say(f"memedge {bench.memedge} on {bench.processor}, {bench.date}, load {load} before.")
    if bench.gemm_gflops is not None:
        terminal.say(
            f"Peak: {bench.gemm_gflops:.0f} GFLOP/s, the fastest float32 matrix product in NumPy during this run, on "
            "as many threads."
        )
    else:
        terminal.say(
            f"No share of the peak: NumPy's matrix products are float32, on the processor; this is {bench.precision}."
        )
