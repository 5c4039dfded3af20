"""`vqguard serve`: a guarded model over HTTP, as OpenAI's clients call one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from vqguard.cli.options import UserPath, adapter_module_option, base_option, debug_option, find_run
from vqguard.cli.output import say
from vqguard.cli.serving.options import bound_socket, server_options


@click.command(
    "serve",
    epilog="""\b
Examples:
  vqguard serve runs/llava-tiny
  vqguard serve runs/llava-tiny --ui --undefended control
  vqguard serve runs/llava-tiny --port 0 --limits limits.yaml
""",
)
@click.argument("run", type=UserPath())
@click.option("--name", help="The model's name for clients. Default: the run's folder.")
@click.option(
    "--ui",
    is_flag=True,
    help="A page at / to look at the model: drop a picture, ask, see verdict, region, codes and "
    "every category's score. Whoever reaches the server sees them too.",
)
@click.option(
    "--undefended",
    type=click.Choice(["control", "base"]),
    help="On the page, a model WITHOUT a guard answers beside it: the run's control (trained as "
    "long, without a quantiser), or the base that the retrofit began with.",
)
@server_options
@base_option
@adapter_module_option
@debug_option
def command(
    *,
    run: Path,
    host: str,
    port: int,
    name: str | None,
    ui: bool,
    undefended: Literal["control", "base"] | None,
    limits_file: Path | None,
    reasons: bool,
    hosts: tuple[str, ...],
    audit_file: Path | None,
    shadow: bool,
    drain: float,
    base: str | None,
) -> None:
    """Serve the guarded model of RUN (a run directory, or the name of one in runs/): chat
    completions, moderations, health and metrics.

    It prints `listening on http://…` once it answers. SIGTERM ends it when the requests that it
    has taken are answered.
    """
    if undefended and not ui:
        raise click.UsageError("--undefended answers on the page: give --ui too")
    if ui and not reasons:
        raise click.UsageError("--ui shows every score, and --no-reasons none: choose one")
    run = find_run(run)
    bound = bound_socket(host, port)

    from vqguard.recipes.run import model_checksum, open_run
    from vqguard.recipes.serving.app import make_app
    from vqguard.recipes.serving.audit import AuditLog
    from vqguard.recipes.serving.door.server import log_requests, serve
    from vqguard.recipes.serving.fetching import fetcher
    from vqguard.recipes.serving.limits import Limits
    from vqguard.recipes.serving.page.undefended import open_undefended
    from vqguard.recipes.serving.reloading import reloader
    from vqguard.recipes.serving.service import Service

    limits = Limits() if limits_file is None else Limits.from_yaml(limits_file)
    fetch = fetcher(hosts, limits) if hosts else None
    loaded = open_run(run, base=base)
    audit = None if audit_file is None else AuditLog(audit_file, model_checksum(run))
    service = Service(
        loaded,
        name or run.resolve().name,
        limits,
        reasons=reasons,
        fetch=fetch,
        audit=audit,
        shadow=shadow,
    )
    beside = None if undefended is None else open_undefended(run, undefended)
    log_requests()
    if ui:
        say("The page shows every score to whoever reaches the server.", err=True)
    if beside is not None:
        say("Beside it answers the {}, WITHOUT a guard.", beside.kind, err=True)
    serve(
        make_app(service, page=ui, undefended=beside),
        bound,
        drain=drain,
        listens=lambda at: say("listening on {}", at),
        reload=reloader(service, run),
    )
