"""``vqguard models``: what can be guarded."""

from __future__ import annotations

import json

import click

from vqguard.cli.options import debug_option


@click.command("models", epilog="\b\nExample:\n  vqguard models --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, one a model.")
@debug_option
def command(*, as_json: bool) -> None:
    """List the model families that can be guarded: names, other names, status."""
    from vqguard.adapters.registry import list_models

    rows = [
        {"name": model.name, "aliases": list(model.aliases), "status": model.status}
        for model in list_models()
    ]
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("Name", "Other names", "Status", box=None, pad_edge=False)
    for row in rows:
        table.add_row(str(row["name"]), ", ".join(row["aliases"]), str(row["status"]))
    Console().print(table)
