"""`memedge explain PROMPT`: the words that carry its score."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    EngineOption,
    JsonOption,
    PlotOption,
    PrecisionOption,
    ProviderOption,
    ThreadsOption,
    app,
    load_detector,
)
from memedge.plain import plain

if TYPE_CHECKING:
    from memedge.detector import EngineInfo
    from memedge.explain import Explanation

BAR = 20  # characters of the longest bar


@app.command()
def explain(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="One prompt, in quotes.")],
    method: Annotated[
        Literal["mask", "gradient"],
        typer.Option(
            "--method",
            help="How much the score falls when a word is masked, or how steeply the norm changes with its embeddings.",
        ),
    ] = "mask",
    output: PlotOption = None,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Say which words of a prompt carry its score."""
    if output:
        from memedge.pictures import check_plot

        check_plot(output)
    detector = load_detector(engine, provider, precision, threads, gradients=method == "gradient")
    with terminal.progress_bar("masking") as progress:
        explanation = detector.explain(prompt, method, progress=progress)
    terminal.print_json(explanation) if json else print_explanation(explanation, detector.info)
    if output:
        _draw(explanation, output)


def print_explanation(explanation: "Explanation", info: "EngineInfo") -> None:
    """Print the prompt with each word on its colour, and a table that says the same without colours."""
    from rich.console import Console
    from rich.text import Text

    from memedge import heat

    deepest, end, line = heat.scale(explanation), 0, Text()
    table = terminal.new_table("word", numbers=("significance",))
    table.add_column("", no_wrap=True)
    for word in explanation.words:
        line.append(plain(explanation.prompt[end : word.start]))
        end = word.end
        if word.significance is None:
            line.append(plain(word.text), "dim strike")
            table.add_row(terminal.cell(word.text), "not read")
            continue
        red, green, blue = heat.colour(word.significance, deepest)
        line.append(plain(word.text), f"black on rgb({red},{green},{blue})")
        length = round(BAR * abs(word.significance) / deepest)
        table.add_row(
            terminal.cell(word.text), f"{word.significance:+.4f}", ("█" if word.significance > 0 else "░") * length
        )
    if explanation.words:
        Console().print(line, soft_wrap=True)
        terminal.print_table(table)
    title = heat.title(explanation)
    unit = "pass" if explanation.passes == 1 else "passes"
    backward = f", {explanation.passes} backward" if explanation.method == "gradient" else ""
    terminal.say(f"{title[0].upper()}{title[1:]}, on {info.key}; {explanation.passes} {unit}{backward}.")
    if explanation.method == "mask" and explanation.kind == "norm":
        terminal.say("It is the norm alone: this engine is not calibrated, and nobody published weights for it.")


def _draw(explanation: "Explanation", output: Path) -> None:
    from memedge.heat import draw

    if not draw(explanation, output):
        terminal.say(f"{output} has boxes for characters that its font lacks.")
