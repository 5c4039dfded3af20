"""`vqguard map`: what a run's safety map holds, what a change of it flips, and changes by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vqguard.cli.options import (
    UserPath,
    adapter_module_option,
    base_option,
    debug_option,
    find_run,
    skip_bad_option,
)
from vqguard.cli.output import field, say, say_json

if TYPE_CHECKING:
    from vqguard.safety_map import SafetyMap

_ACTIONS = ("report", "warn", "blank", "refuse", "raise")


@click.group(
    "map",
    epilog="\b\nExample:\n  vqguard map show runs/llava-tiny",
    context_settings={"max_content_width": 100},
)
def command() -> None:
    """Show the safety map of a run, compare it with another, or change it by hand."""


@command.command(
    "show", epilog="\b\nExample:\n  vqguard map show runs/llava-tiny --json > map.json"
)
@click.argument("run", type=UserPath())
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@adapter_module_option
@debug_option
def show(*, run: Path, as_json: bool) -> None:
    """Print the categories of RUN's safety map with their thresholds and policies, and every cell
    that holds evidence.
    """
    from vqguard.recipes.judging.map_changes import category_rows, cell_rows, read_map

    safety_map = read_map(find_run(run))
    categories, cells = category_rows(safety_map), cell_rows(safety_map)
    measured = safety_map.false_positives
    unfamiliar = safety_map.judging.unfamiliar
    if as_json:
        say_json(
            {
                "version": safety_map.version,
                "rule": safety_map.rule,
                "prior": safety_map.prior,
                "smoothing": safety_map.judging.smoothing,
                "false_positives": None if measured is None else measured.to_dict(),
                "unfamiliar": None if unfamiliar is None else unfamiliar.to_dict(),
                "categories": categories,
                "cells": cells,
            }
        )
        return
    say("Map {}: rule {}, prior {}.", safety_map.version[:12], safety_map.rule, safety_map.prior)
    if measured is not None:
        promise = (
            "a new neutral image is flagged with P at most" if measured.conformal else "budget"
        )
        say(
            "False positives: {} {:.2%}; {} of {} held out, 95 % interval {:.2%} to {:.2%}.",
            promise,
            measured.budget,
            measured.flagged,
            measured.n,
            measured.low,
            measured.high,
        )
    if unfamiliar is not None:
        far = {
            "judged": "a token farther than {:.4g} from every codeword",
            "visual": "visual tokens farther than {:.4g} from their codewords",
        }[unfamiliar.by]
        named = ", before any category" if unfamiliar.first else ""
        say(f"Unfamiliar: {far}{named}.", unfamiliar.distance)
    for row in categories:
        under = f", under {row['parent']}" if row["parent"] else ""
        say(
            "{}: {} counted, threshold {:.3f}, {}{}",
            field(row["category"]),
            row["counted"],
            row["threshold"],
            row["policy"]["action"],
            under,
        )
    for row in cells:
        counts = ", ".join(f"{name} {count}" for name, count in row["counts"].items())
        rule = f"; {row['rule']['verdict']}: {row['rule']['reason']}" if row["rule"] else ""
        say(
            "cell {}: {} ({}, score {:.3f}; {}){}",
            row["cell"],
            field(row["category"]),
            row["action"],
            row["score"],
            counts or "no images",
            rule,
        )


@command.command(
    "diff",
    epilog="\b\nExample:\n  vqguard map diff runs/llava-tiny --images photos --tau 0.4 "
    "--html diff.html",
)
@click.argument("run", type=UserPath())
@click.option(
    "--images",
    multiple=True,
    type=UserPath(),
    help="An image, or a directory of images, to judge by both. Repeatable.",
)
@click.option(
    "--log",
    type=UserPath(exists=True, dir_okay=False),
    help="The audit log of a server of RUN, in place of images: its codes are judged anew, and "
    "compared with what was logged.",
)
@click.option(
    "--against",
    type=UserPath(),
    help="Another run whose map is compared; its guard must have the same semantic codebook. "
    "Default: RUN's own map, changed by --tau and --rule.",
)
@click.option("--tau", type=click.FloatRange(0, 1, max_open=True), help="Compare this threshold.")
@click.option("--rule", help="Compare this verdict rule.")
@click.option("--html", "page", type=UserPath(), help="Write a page with the pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@skip_bad_option
@base_option
@adapter_module_option
@debug_option
def diff(
    *,
    run: Path,
    images: tuple[Path, ...],
    log: Path | None,
    against: Path | None,
    tau: float | None,
    rule: str | None,
    page: Path | None,
    as_json: bool,
    skip_bad: bool,
    base: str | None,
) -> None:
    """Judge images by RUN's map and by another map or rule, and name those whose verdict flips."""
    if (not images) == (log is None):
        raise click.UsageError("Say what to judge: --images, or --log of a server.")
    if log is None and against is None and tau is None and rule is None:
        raise click.UsageError("Say what to compare with: --against RUN, --tau or --rule.")
    run = find_run(run)
    from vqguard.recipes.judging.map_changes import (
        changed_map,
        described,
        diff_maps,
        read_map,
    )

    other = changed_map(read_map(run if against is None else find_run(against)), tau=tau, rule=rule)
    if log is not None:
        _diff_log(log, other, as_json=as_json)
        return
    result = diff_maps(run, other, images, skip_bad=skip_bad, base=base)
    for path in result.skipped:
        say("Skipped: {}", path, err=True)
    for flip in result.flips:
        if as_json:
            say_json(
                {
                    "image": str(flip.path),
                    "before": flip.before.to_dict(),
                    "after": flip.after.to_dict(),
                }
            )
        else:
            before, after = described(flip.before), described(flip.after)
            say("{}: {} -> {}", field(flip.path), before, after)
    if page is not None:
        from vqguard.recipes.report.map_page import write_map_page

        write_map_page(result, page)
        say("Page: {}", page, err=True)
    say("{} of {} images change.", len(result.flips), result.images, err=True)


def _diff_log(log: Path, other: SafetyMap, *, as_json: bool) -> None:
    from vqguard.recipes.judging.logged_verdicts import diff_log
    from vqguard.recipes.judging.map_changes import described

    result = diff_log(log, other)
    for flip in result.flips:
        if as_json:
            category, action = flip.before
            before = {"category": category, "action": action}
            say_json({"sha256": flip.sha256, "before": before, "after": flip.after.to_dict()})
        else:
            name = flip.sha256 or flip.request
            say("{}: {} ({}) -> {}", name, *flip.before, described(flip.after))
    say("{} of {} pictures change.", len(result.flips), result.pictures, err=True)
    if result.unfamiliar:
        say("{} were unfamiliar, and are left as they were.", result.unfamiliar, err=True)


@command.command(
    "edit",
    epilog="\b\nExamples:\n  vqguard map edit runs/llava-tiny --threshold gun=0.4 --policy "
    'alcohol=report\n  vqguard map edit runs/llava-tiny --allow 17 --reason "a drill, seen"',
)
@click.argument("run", type=UserPath())
@click.option("--tau", type=click.FloatRange(0, 1, max_open=True), help="Threshold of all.")
@click.option("--rule", help="What is compared with the thresholds.")
@click.option(
    "--threshold",
    "thresholds",
    multiple=True,
    metavar="CATEGORY=TAU",
    help="Threshold of a category or a parent; CATEGORY= takes it away. Repeatable.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="CATEGORY=ACTION",
    help=f"Policy of a category, a parent, unseen or unfamiliar: {', '.join(_ACTIONS)} (warn needs "
    "--policies); CATEGORY= takes it away. Repeatable.",
)
@click.option(
    "--policies",
    "policies_file",
    type=UserPath(exists=True, dir_okay=False),
    help="A YAML file of policies with their texts.",
)
@click.option("--language", help="Language of the refusals.")
@click.option(
    "--forbid",
    multiple=True,
    metavar="CELL=CATEGORY",
    help="Flag a cell as a category, whatever its score. Needs --reason. Repeatable.",
)
@click.option(
    "--allow",
    multiple=True,
    type=int,
    metavar="CELL",
    help="Let a cell pass, whatever its score. Needs --reason. Repeatable.",
)
@click.option(
    "--release",
    multiple=True,
    type=int,
    metavar="CELL",
    help="Take a cell's rule away. Repeatable.",
)
@click.option("--reason", default="", help="Why cells are forbidden or allowed; kept in the map.")
@adapter_module_option
@debug_option
def edit(
    *,
    run: Path,
    tau: float | None,
    rule: str | None,
    thresholds: tuple[str, ...],
    policies: tuple[str, ...],
    policies_file: Path | None,
    language: str | None,
    forbid: tuple[str, ...],
    allow: tuple[int, ...],
    release: tuple[int, ...],
    reason: str,
) -> None:
    """Change RUN's safety map in its place: thresholds, policies, refusal texts, single cells. The
    counts stay.
    """
    run = find_run(run)
    from vqguard.recipes.judging.map_changes import MapEdit, edit_map, read_policies

    by_category: dict[str, Any] = {} if policies_file is None else read_policies(policies_file)
    for name, action in _pairs(policies, "--policy"):
        by_category[name] = {"action": action} if action else None
    cells: list[dict[str, Any]] = [
        {"cell": cell, "verdict": "allow", "reason": reason} for cell in allow
    ]
    for cell, category in _pairs(forbid, "--forbid"):
        number = _number(cell, int, "--forbid")
        cells.append({"cell": number, "verdict": "forbid", "reason": reason, "category": category})
    change = MapEdit.from_dict(
        {
            "tau": tau,
            "rule": rule,
            "thresholds": {
                name: _number(value, float, "--threshold") if value else None
                for name, value in _pairs(thresholds, "--threshold")
            },
            "policies": by_category,
            "language": language,
            "cells": cells,
            "release": list(release),
        }
    )
    if change == MapEdit():
        raise click.UsageError("Say what to change: vqguard map edit --help lists it.")
    old, new = edit_map(run, change)
    say("Safety map of {} changed: {} -> {}.", run, old.version[:12], new.version[:12])
    if old.false_positives is not None and new.false_positives is None:
        say(
            "Its false-positive budget of {:.2%} was measured on the old map and holds no longer: "
            "calibrate again with --fpr to have one.",
            old.false_positives.budget,
            err=True,
        )


def _pairs(values: tuple[str, ...], option: str) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, equals, said = value.rpartition("=")
        if not equals or not name:
            raise click.UsageError(f"{option} expects NAME=VALUE, got {value!r}.")
        pairs.append((name, said))
    return pairs


def _number(text: str, kind: type[int] | type[float], option: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise click.UsageError(f"{option} expects a number, got {text!r}.") from error
