"""``vqguard evaluate``: measure a finished run again."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.group import Session
from vqguard.cli.options import debug_option, find_run
from vqguard.cli.output import show_report


@click.command("evaluate", epilog="\b\nExample:\n  vqguard evaluate runs/llava-tiny")
@click.argument("run", type=click.Path(path_type=Path))
@debug_option
@click.pass_obj
def command(session: Session, *, run: Path) -> None:
    """Measure the models of RUN again, attacks included, and rewrite its report."""
    run = find_run(run)

    from vqguard.recipes.evaluate import evaluate_run

    result = evaluate_run(run, command=session.command)
    show_report(result.records, result.report_html, result.report_json)
