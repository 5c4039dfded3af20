"""`vqguard serve`: a guarded model over HTTP, as OpenAI's clients call one."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.options import UserPath, adapter_module_option, base_option, debug_option, find_run
from vqguard.cli.output import say
from vqguard.cli.serving.options import bound_socket, server_options


@click.command(
    "serve",
    epilog="""\b
Examples:
  vqguard serve runs/llava-tiny
  vqguard serve runs/llava-tiny --port 0 --limits limits.yaml
""",
)
@click.argument("run", type=UserPath())
@click.option("--name", help="The model's name for clients. Default: the run's folder.")
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
    run = find_run(run)
    bound = bound_socket(host, port)

    from vqguard.recipes.run import model_checksum, open_run
    from vqguard.recipes.serving.app import make_app
    from vqguard.recipes.serving.audit import AuditLog
    from vqguard.recipes.serving.door.server import log_requests, serve
    from vqguard.recipes.serving.fetching import fetcher
    from vqguard.recipes.serving.limits import Limits
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
    log_requests()
    serve(
        make_app(service),
        bound,
        drain=drain,
        listens=lambda at: say("listening on {}", at),
        reload=reloader(service, run),
    )
