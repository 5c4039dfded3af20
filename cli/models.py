"""`vqguard models`: what can be guarded."""

from __future__ import annotations

from typing import Any

import click

from vqguard.cli.options import debug_option
from vqguard.cli.output import say, say_json, say_lines
from vqguard.names import printable


@click.command("models", epilog="\b\nExample:\n  vqguard models --json")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, one a model.")
@debug_option
def command(*, as_json: bool) -> None:
    """List the models that can be guarded: names, other names, status."""
    rows = _rows()
    if as_json:
        for row in rows:
            say_json(row)
        return

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Name", "Other names", "Status", "Note", box=None, pad_edge=False)
    for row in rows:
        name, status, note = (Text(printable(row[key])) for key in ("name", "status", "note"))
        table.add_row(name, Text("\n".join(map(printable, row["aliases"]))), status, note)
    # As wide as its names need: a name that is cut cannot be copied.
    width = Console(width=1000).measure(table).maximum
    # Without colours: what it writes is escaped like everything else.
    console = Console(highlight=False, width=max(width, Console().width), force_terminal=False)
    with console.capture() as shown:
        console.print(table)
    say_lines(shown.get())
    say("measured: the project's own reports use these weights.")
    say("architecture: only the architecture is tested, with random weights.")


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
