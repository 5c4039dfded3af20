"""`vqguard calibrate`: a safety map from images of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.options import (
    UserPath,
    adapter_module_option,
    base_option,
    debug_option,
    find_run,
    skip_bad_option,
)
from vqguard.cli.output import say
from vqguard.paper import PAPER_TAU


@click.command(
    "calibrate",
    epilog="\b\nExample:\n  vqguard calibrate runs/llava-tiny --images my-images --fpr 0.01",
)
@click.argument("run", type=UserPath())
@click.option(
    "--images",
    required=True,
    type=UserPath(exists=True, file_okay=False),
    help="A directory with one subdirectory of images for each category, 'neutral' among them.",
)
@click.option(
    "--fpr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Choose the threshold for this false-positive rate on held-out neutral images.",
)
@click.option(
    "--tau",
    type=click.FloatRange(0, 1, max_open=True),
    help=f"Use this threshold. Default, if --fpr is not given either: {PAPER_TAU} (the paper's).",
)
@click.option(
    "--rule",
    default="category",
    show_default=True,
    help="What is compared with the threshold: category (the most probable toxic category, as in "
    "the paper), any (all of them together), or a rule that an adapter module registers.",
)
@click.option(
    "--rules",
    type=UserPath(exists=True, dir_okay=False),
    help="A YAML file with more: smoothing, unfamiliar, hierarchy, thresholds and policies by "
    "category, refusal texts.",
)
@click.option(
    "--labels",
    type=UserPath(exists=True, dir_okay=False),
    help="A .csv (path,label[,label...] a line) or .jsonl list of the images' labels; its paths "
    "start from --images, which needs no folder a category then.",
)
@click.option(
    "--keep-examples",
    is_flag=True,
    help="Keep small copies of the images nearest to each code in RUN, so that scan --explain can "
    "show them beside a verdict. Without it those of the old map are removed.",
)
@skip_bad_option
@base_option
@adapter_module_option
@debug_option
def command(
    *,
    run: Path,
    images: Path,
    fpr: float | None,
    tau: float | None,
    rule: str,
    rules: Path | None,
    labels: Path | None,
    keep_examples: bool,
    skip_bad: bool,
    base: str | None,
) -> None:
    """Count which semantic codes the images of each category fall in, and replace the safety
    map of RUN by one made from these counts. RUN is a run's directory, or a guarded model's as
    export writes it, whole or without its base; nothing but its map is changed.
    """
    if fpr is not None and tau is not None:
        raise click.UsageError("--fpr and --tau exclude each other: give one of them.")
    if fpr is None and tau is None:
        tau = PAPER_TAU
    run = find_run(run)

    from vqguard.judging.rules import JudgeRules
    from vqguard.recipes.calibrate import calibrate_run

    own = JudgeRules() if rules is None else JudgeRules.from_yaml(rules)
    result = calibrate_run(
        run,
        images,
        fpr=fpr,
        tau=tau,
        rule=rule,
        rules=own,
        labels=labels,
        skip_bad=skip_bad,
        base=base,
        keep_examples=keep_examples,
    )
    for path in result.skipped:
        say("Skipped: {}", path, err=True)
    for text in result.warnings:
        say("Warning: {}.", text, err=True)
    measured = result.map.false_positives
    if measured is not None:
        say(
            "A new neutral image like these is flagged with probability at most {:.2%}: {} of the "
            "{} held out are; 95 % interval of the rate {:.2%} to {:.2%}.",
            measured.budget,
            measured.flagged,
            measured.n,
            measured.low,
            measured.high,
        )
    say("Safety map of {} replaced: categories {}.", run, ", ".join(result.map.categories))
