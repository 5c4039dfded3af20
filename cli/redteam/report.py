"""`vqguard report`: one page of several attack results."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.group import Session
from vqguard.cli.options import UserPath, debug_option
from vqguard.cli.output import say


@click.command(
    "report",
    epilog="""\b
Example:
  vqguard report attacks/quick attacks/adaptive --output attacks/all
""",
)
@click.argument("results", nargs=-1, required=True, type=UserPath(exists=True, file_okay=False))
@click.option(
    "--output",
    type=UserPath(),
    required=True,
    metavar="DIR",
    help="Where the page, the records and copies of the pictures go; a folder that is empty or "
    "missing.",
)
@debug_option
@click.pass_obj
def command(session: Session, *, results: tuple[Path, ...], output: Path) -> None:
    """Merge the RESULTS of `vqguard attack` into one HTML page and one JSON file."""
    from vqguard.recipes.attacking.merge import merge_results
    from vqguard.recipes.attacking.run_suite import RECORDS, REPORT

    merge_results(results, output, command=session.command)
    say("Report: {}", output / REPORT)
    say("Numbers: {}", output / RECORDS)
