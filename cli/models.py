"""`vqguard models`: what can be guarded."""

from __future__ import annotations

import json
from typing import Any

import click

from vqguard.cli.options import debug_option


@click.command("models", epilog="\b\nExample:\n  vqguard models --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, one a model.")
@debug_option
def command(*, as_json: bool) -> None:
    """List the models that can be guarded: names, other names, status."""
    rows = _rows()
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
        return

    from rich.console import Console
    from rich.table import Table

    table = Table("Name", "Other names", "Status", "Note", box=None, pad_edge=False)
    for row in rows:
        table.add_row(row["name"], "\n".join(row["aliases"]), row["status"], row["note"])
    # As wide as its names need: a name that is cut cannot be copied.
    width = Console(width=1000).measure(table).maximum
    Console(highlight=False, width=max(width, Console().width)).print(table)
    click.echo("\nmeasured: the project's own reports use these weights.")
    click.echo("architecture: only the architecture is tested, with random weights.")


def _rows() -> list[dict[str, Any]]:
    """One row for each set of weights; the first of its names leads."""
    from vqguard.adapters.catalogue import list_models

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for model in list_models():
        row = rows.setdefault(
            (model.source, model.location),
            {"name": model.name, "aliases": [], "status": model.status, "note": model.note},
        )
        if model.name != row["name"]:
            row["aliases"].append(model.name)
    for (source, location), row in rows.items():
        if source == "hub" and location != row["name"]:
            row["aliases"].append(location)
    return list(rows.values())
