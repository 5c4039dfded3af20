"""`vqguard serve`: a guarded model over HTTP, as OpenAI's clients call one."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.options import adapter_module_option, base_option, debug_option, find_run
from vqguard.cli.output import say


@click.command(
    "serve",
    epilog="""\b
Examples:
  vqguard serve runs/llava-tiny
  vqguard serve runs/llava-tiny --port 0 --limits limits.yaml
""",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="The port to listen on; 0 is any free one.",
)
@click.option("--name", help="The model's name for clients. Default: the run's folder.")
@click.option(
    "--limits",
    "limits_file",
    type=click.Path(path_type=Path),
    help="A YAML file with limits, as docs/serving.md lists them.",
)
@click.option(
    "--reasons/--no-reasons",
    default=True,
    show_default=True,
    help="Tell clients category, score, threshold and region of what is flagged. Scores help "
    "whoever searches for a picture that passes.",
)
@click.option(
    "--image-host",
    "hosts",
    multiple=True,
    metavar="HOST",
    help="Fetch pictures from this host, by https. Repeatable; without it none are fetched.",
)
@click.option(
    "--drain",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="Seconds that requests have to end after SIGTERM.",
)
@base_option
@adapter_module_option
@debug_option
def command(
    *,
    run: Path,
    host: str,
    port: int,
    name: str | None,
    limits_file: Path | None,
    reasons: bool,
    hosts: tuple[str, ...],
    drain: float,
    base: str | None,
) -> None:
    """Serve the guarded model of RUN (a run directory, or the name of one in runs/): chat
    completions, moderations, health and metrics.

    It prints `listening on http://…` once it answers. SIGTERM ends it when the requests that it
    has taken are answered.
    """
    run = find_run(run)
    try:
        from vqguard.recipes.serving.door.server import bind, log_requests, serve
    except ImportError as error:
        raise click.UsageError(
            f"{error.name} is not installed: pip install 'vqguard[serve]'"
        ) from error

    bound = bind(host, port)  # before the model is loaded: a port that is taken is said at once

    from vqguard.recipes.run import open_run
    from vqguard.recipes.serving.app import make_app
    from vqguard.recipes.serving.fetching import fetcher
    from vqguard.recipes.serving.limits import Limits
    from vqguard.recipes.serving.service import Service

    limits = Limits() if limits_file is None else Limits.from_yaml(limits_file)
    fetch = fetcher(hosts, limits) if hosts else None
    service = Service(
        open_run(run, base=base),
        name or run.resolve().name,
        limits,
        reasons=reasons,
        fetch=fetch,
    )
    log_requests()
    serve(make_app(service), bound, drain=drain, listens=lambda at: say("listening on {}", at))
