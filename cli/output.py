"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from vqguard.records import Record


def show_report(records: Sequence[Record], html: Path | None, numbers: Path) -> None:
    """Print the before/after table of a run and where its report is."""
    from vqguard.recipes.report.headline import format_summary

    click.echo(format_summary(records))
    if html is not None:
        click.echo(f"Report: {html}")
    click.echo(f"Numbers: {numbers}")
