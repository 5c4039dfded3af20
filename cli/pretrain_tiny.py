"""`vqguard pretrain-tiny`: the base model of the embedded world."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.group import Session
from vqguard.cli.options import UserPath, check_output, debug_option, resume_option, set_option
from vqguard.cli.output import say, show_report


@click.command(
    "pretrain-tiny",
    epilog="\b\nExample:\n  vqguard pretrain-tiny --output runs/base --set seed=1",
)
@click.option(
    "--output",
    type=UserPath(),
    default=Path("runs/llava-tiny-base"),
    show_default=True,
    help="The directory to write.",
)
@click.option(
    "--config",
    type=UserPath(exists=True, dir_okay=False),
    help="A recipe in YAML. Default: the one that made the shipped weights.",
)
@set_option("seed=1")
@resume_option
@debug_option
@click.pass_obj
def command(
    session: Session, *, output: Path, config: Path | None, settings: tuple[str, ...], resume: bool
) -> None:
    """Train llava-tiny's undefended base model from nothing: its vision tower, then the whole.

    The package ships weights made this way, so that a retrofit does not need this command.
    """
    check_output(output, resume)

    from vqguard.recipes.pretrain_tiny import load_pretrain_recipe, pretrain

    recipe = load_pretrain_recipe(config).override(list(settings))
    result = pretrain(recipe, output, resume=resume, command=session.command)
    say("Weights: {}", result.weights)
    show_report(result.records, None, result.report_json)
