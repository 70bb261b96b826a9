"""`memedge demo`: the embedded engine at work."""

from pathlib import Path
from typing import Annotated

import typer

from memedge.commands import terminal
from memedge.commands.detect import print_verdicts
from memedge.commands.options import (
    EngineOption,
    JsonOption,
    PrecisionOption,
    ProviderOption,
    ThreadsOption,
    app,
    load_detector,
)


@app.command()
def demo(
    picture: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="The picture to write.")] = Path(
        "memedge-demo.png"
    ),
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    json: JsonOption = False,
) -> None:
    """Score a mixed list of prompts, and draw what they generate.

    With the embedded engine, whose model has memorized some of them."""
    from memedge.demo import draw, prompts
    from memedge.engine.places import check_folder_of

    check_folder_of(picture, "name another with --output")
    detector = load_detector(engine, provider, precision, threads)
    verdicts = detector.detect(prompts(), "off")
    verdicts.sort(key=lambda verdict: (bool(verdict.memorized), verdict.score or verdict.norm), reverse=True)
    draw(verdicts, picture)
    if json:
        terminal.print_json(verdicts)
    else:
        print_verdicts(verdicts, detector.info)
        terminal.say(f"Training images beside what the model generates: {picture}")
