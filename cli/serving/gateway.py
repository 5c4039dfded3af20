"""`vqguard gateway`: judge the pictures of requests to an engine that cannot be changed."""

from __future__ import annotations

import os
from pathlib import Path

import click

from vqguard.cli.options import UserPath, adapter_module_option, base_option, debug_option, find_run
from vqguard.cli.output import say
from vqguard.cli.serving.options import bound_socket, server_options

_KEY = "VQGUARD_UPSTREAM_KEY"


@click.command(
    "gateway",
    epilog="""\b
Examples:
  vqguard gateway --upstream http://127.0.0.1:30000 --run runs/mine
  VQGUARD_UPSTREAM_KEY=… vqguard gateway --upstream https://api.example.org --run runs/mine
""",
)
@click.option(
    "--upstream",
    required=True,
    metavar="URL",
    help="The engine's address, without /v1. Its key may stand in VQGUARD_UPSTREAM_KEY; else the "
    "client's is handed on.",
)
@click.option(
    "--run",
    "run",
    required=True,
    type=UserPath(),
    help="The run whose guard judges (a run directory, or the name of one in runs/).",
)
@server_options
@base_option
@adapter_module_option
@debug_option
def command(
    *,
    upstream: str,
    run: Path,
    host: str,
    port: int,
    limits_file: Path | None,
    reasons: bool,
    hosts: tuple[str, ...],
    audit_file: Path | None,
    shadow: bool,
    drain: float,
    base: str | None,
) -> None:
    """Serve OpenAI's chat completions before another engine: every picture of a request is judged
    by the guard of a run, encoded anew and handed on, or the request is refused.

    It judges and does not quantise: the engine sees the pictures themselves, and a picture that
    the judge does not flag acts on it as without a guard.
    """
    run = find_run(run)
    bound = bound_socket(host, port)

    from vqguard.recipes.run import model_checksum, open_judge
    from vqguard.recipes.serving.audit import AuditLog
    from vqguard.recipes.serving.door.server import log_requests, serve
    from vqguard.recipes.serving.fetching import fetcher
    from vqguard.recipes.serving.gateway import SAYS, make_gateway
    from vqguard.recipes.serving.limits import Limits
    from vqguard.recipes.serving.reloading import reloader
    from vqguard.recipes.serving.service import Service
    from vqguard.recipes.serving.upstream import Upstream

    limits = Limits() if limits_file is None else Limits.from_yaml(limits_file)
    key = os.environ.get(_KEY)
    engine = Upstream(upstream, limits.seconds, key, most_waiting=limits.waiting_bytes)
    fetch = fetcher(hosts, limits) if hosts else None
    loaded = open_judge(run, base=base)
    audit = None if audit_file is None else AuditLog(audit_file, model_checksum(run))
    service = Service(
        loaded,
        run.resolve().name,
        limits,
        reasons=reasons,
        fetch=fetch,
        audit=audit,
        shadow=shadow,
        answers=False,
    )
    log_requests()
    say("Pictures are {} on their way to {}.", SAYS, engine.url, err=True)
    serve(
        make_gateway(service, engine),
        bound,
        drain=drain,
        listens=lambda at: say("listening on {}", at),
        reload=reloader(service, run),
    )
