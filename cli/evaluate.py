"""`vqguard evaluate`: measure a finished run again."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.group import Session
from vqguard.cli.options import UserPath, adapter_module_option, debug_option, find_run, set_option
from vqguard.cli.output import show_report


@click.command(
    "evaluate",
    epilog="""\b
Examples:
  vqguard evaluate runs/llava-tiny
  vqguard evaluate runs/llava-tiny --set evaluation.attack.steps=250
""",
)
@click.argument("run", type=UserPath())
@set_option("evaluation.attack.steps=250")
@adapter_module_option
@debug_option
@click.pass_obj
def command(session: Session, *, run: Path, settings: tuple[str, ...]) -> None:
    """Measure the models of RUN again, attacks included, and rewrite its report."""
    run = find_run(run)

    from vqguard.recipes.evaluate import evaluate_run

    result = evaluate_run(run, command=session.command, overrides=settings)
    show_report(result.records, result.report_html, result.report_json)
