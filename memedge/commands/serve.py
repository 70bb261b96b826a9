"""`memedge serve`: verdicts over HTTP."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from memedge.commands import terminal
from memedge.commands.options import (
    EngineOption,
    PrecisionOption,
    ProviderOption,
    TargetFprOption,
    ThreadsOption,
    ThresholdOption,
    app,
)


@app.command(context_settings={"auto_envvar_prefix": "MEMEDGE_SERVE"})
def serve(
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="Processes on the port.")] = 1,
    engine: EngineOption = None,
    provider: ProviderOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = None,
    threshold: ThresholdOption = None,
    target_fpr: TargetFprOption = None,
    queue: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Prompts in the gate at once.", show_default="10 seconds of work"),
    ] = None,
    cache: Annotated[
        int, typer.Option(metavar="N", min=0, help="Verdicts kept for prompts of the same tokens.", show_default="none")
    ] = 0,
    body_bytes: Annotated[int, typer.Option(metavar="N", min=1, help="Largest body of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(metavar="S", min=0.01, help="Seconds that a request may take.")] = 30.0,
    full_status: Annotated[
        Literal["429", "503"], typer.Option(help="What is answered where the gate is full.")
    ] = "429",
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Holds the bearer token that requests need.", show_default="none"),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="The token itself; better in the environment.", show_default="none"),
    ] = None,
    log_prompts: Annotated[
        Literal["none", "hash", "text"], typer.Option(help="What the access log says of prompts.")
    ] = "none",
) -> None:
    """Serve verdicts over HTTP: the gate before a generator.

    Each flag is an environment variable too, such as MEMEDGE_SERVE_PORT. SIGTERM ends it once what is under way is
    done; SIGHUP opens the engine again. Needs memedge[serve].
    """
    try:
        from memedge.server import logs, run
        from memedge.server.settings import Settings
    except ModuleNotFoundError as error:
        from memedge.engine.errors import MemedgeError, not_installed

        raise MemedgeError(not_installed("`memedge serve`", error, "serve")) from error
    settings = Settings(
        engine=engine,
        provider=provider,
        precision=precision,
        threads=threads,
        threshold=threshold,
        target_fpr=target_fpr,
        most_prompts=queue,
        cache=cache,
        body_bytes=body_bytes,
        timeout=timeout,
        full_status=429 if full_status == "429" else 503,
        token=run.read_token(token_file, token),
        log_prompts=log_prompts,
    )
    where = run.listen(host, port)
    logs.begin()
    address, taken = where.getsockname()[:2]
    terminal.say(
        f"memedge serves on http://{address}:{taken}/ with {workers} {'process' if workers == 1 else 'processes'}."
    )
    sys.exit(run.serve(settings, where, workers))
