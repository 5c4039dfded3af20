"""What a run's judges say of scenes that they were not taught, on enough of them to tell.

    python -m benchmarks.hard_sets runs/demo --scenes 2000

The same scenes as `vqguard evaluate RUN --set evaluation.hard_sets=true`, and those of every report
(none to four distractors, normal, single and crowded neutral ones), in a number that the recipe's
half hour has no time for. No language model runs. Prints the tables of docs/judge.md. With
`--unfamiliar SHARE` the regional map calls that share of neutral calibration images unfamiliar, by
their visual tokens and before any category, and the tables say what scenes are called.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vqguard.intervals import wilson
from vqguard.recipes.evaluation.hard_sets import measure_hard_sets
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.screened import DISTRACTORS
from vqguard.recipes.evaluation.toxic import measure_toxic
from vqguard.recipes.image_batches import batches, image_features, pixel_count
from vqguard.recipes.judging.both import read_global_map
from vqguard.recipes.judging.regional import share_out
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.run import RECIPE, LoadedRun, open_run
from vqguard.recipes.tiny.scenes import NEUTRAL_SCENES
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.records import Record, write_records
from vqguard.safety_map import NEUTRAL, UNFAMILIAR, SafetyMap

JUDGES = ("regional", "global")


def know_unfamiliar(loaded: LoadedRun, recipe: RetrofitRecipe, share: float) -> SafetyMap:
    """The guard's map with a distance from the neutral images that its judge has not learnt from.

    As a retrofit with `rules.unfamiliar_by=visual` and `rules.unfamiliar_first=true` chooses it.
    """
    guard, numbers = loaded.model.vqguard, recipe.regional
    world = TinyWorld(recipe.seed)
    labels: list[tuple[str, ...]] = [
        *((name,) for name in world.categories for _ in range(numbers.per_category)),
        *[(NEUTRAL,)] * numbers.neutral,
    ]
    shares = share_out(labels, numbers, recipe.seed)
    unseen = set(torch.cat([shares.counted, shares.held_out]).tolist())
    images = (
        image
        for place, (name, image) in enumerate(
            world.judge_images(numbers.per_category, numbers.neutral)
        )
        if name == NEUTRAL and place in unseen
    )
    far = [
        guard.visual_distances(image_features(loaded.model, loaded.processor, batch).tokens)
        for batch in batches(images, pixel_count)
    ]
    made: SafetyMap = guard.safety_map.with_unfamiliar(
        share, torch.cat(far), first=True, patch_checksum=guard.checksum("patch")
    )
    return made


def measure(
    run: Path, split: Any, scenes: int, seed: int, unfamiliar: float | None = None
) -> Ledger:
    """Records of both judges on ordinary scenes and on the hard sets."""
    loaded = open_run(run)
    if unfamiliar is not None:
        recipe = RetrofitRecipe.from_yaml(run / RECIPE)
        guard = loaded.model.vqguard
        guard.safety_map = know_unfamiliar(loaded, recipe, unfamiliar)
    world = TinyWorld(seed, split)
    per_category = math.ceil(scenes / len(world.categories))
    ledger = Ledger(f"python -m benchmarks.hard_sets --scenes {scenes} --split {split}", seed)
    asked = loaded.model, loaded.processor, world, per_category, scenes
    global_map = read_global_map(run, loaded.model.vqguard)
    measure_toxic(ledger, *asked, global_map)
    measure_hard_sets(ledger, *asked, global_map)
    return ledger


def rate(records: Iterable[Record]) -> str:
    """The share over all of these records' images, with its 95 % interval; a dash without any."""
    mine = list(records)
    n = sum(record.n for record in mine)
    if n == 0:
        return "–"
    hits = sum(round(record.value * record.n) for record in mine)
    low, high = wilson(hits, n)
    return f"{100 * hits / n:.1f} % ({100 * low:.1f}–{100 * high:.1f})"


def row(ledger: Ledger, name: str, metrics: Iterable[tuple[str, dict[str, Any]]]) -> str:
    """A row of Markdown: a cell for each metric and judge."""
    cells = [
        rate(
            record
            for record in ledger.records
            if record.metric == metric
            and (condition | {"judge": judge}).items() <= record.condition.items()
            and not (record.condition.get("category") == "all" and "distractors" in condition)
        )
        for metric, condition in metrics
        for judge in JUDGES
    ]
    return f"| {' | '.join([name, *cells])} |"


def tables(ledger: Ledger, sets: Sequence[str]) -> str:
    """Markdown: ordinary scenes, then the hard sets."""
    heads = [f"{metric}, {judge}" for metric in ("DSR", "FPR") for judge in JUDGES]
    lines = ["| scenes | regional | global |", "|" + " --- |" * 3]
    lines += [
        row(ledger, f"DSR, {beside} distractors", [("dsr", {"distractors": beside})])
        for beside in DISTRACTORS
    ]
    lines += [row(ledger, f"FPR, {kind}", [("fpr", {"scenes": kind})]) for kind in NEUTRAL_SCENES]
    lines += ["", f"| scenes | {' | '.join(heads)} |", "|" + " --- |" * 5]
    lines += [
        row(ledger, name, [("dsr", {"set": name}), ("fpr", {"scenes": name})]) for name in sets
    ]
    return "\n".join([*lines, *called(ledger, sets)])


def called(ledger: Ledger, sets: Sequence[str]) -> list[str]:
    """Markdown: what neutral scenes are called by the regional judge, and toxic ones beside it."""
    if not any(record.metric == "called_toxic" for record in ledger.records):
        return []
    lines = [
        "",
        "| scenes | neutral, flagged | of these called toxic | neutral, called unfamiliar |"
        " toxic, flagged | of these called unfamiliar |",
        "|" + " --- |" * 6,
    ]
    for kind in [*NEUTRAL_SCENES, *sets]:
        metrics = [(metric, {"scenes": kind}) for metric in ("fpr", "called_toxic", "unfamiliar")]
        lines.append(named(ledger, kind, metrics, ("set", kind) if kind in sets else None))
    lines += [
        named(ledger, f"{beside} distractors", [], ("distractors", beside))
        for beside in DISTRACTORS
    ]
    return lines


def named(
    ledger: Ledger,
    name: str,
    metrics: Iterable[tuple[str, dict[str, Any]]],
    toxic: tuple[str, Any] | None,
) -> str:
    """A row of `called`."""
    cells = [
        rate(
            record
            for record in ledger.records
            if record.metric == metric
            and (condition | {"judge": JUDGES[0]}).items() <= record.condition.items()
        )
        for metric, condition in metrics
    ] or ["–"] * 3
    said = [
        verdict
        for verdict in ledger.verdicts
        if toxic is not None
        and verdict["metric"] == "dsr"
        and {toxic, ("judge", JUDGES[0])} <= set(verdict["condition"].items())
    ]
    flagged = [verdict for verdict in said if verdict["flagged"]]
    for hits, every in (
        (len(flagged), len(said)),
        (sum(verdict["category"] == UNFAMILIAR for verdict in flagged), len(said)),
    ):
        low, high = wilson(hits, every) if every else (0.0, 0.0)
        shown = f"{100 * hits / every:.1f} % ({100 * low:.1f}–{100 * high:.1f})" if every else "–"
        cells.append(shown)
    return f"| {' | '.join([name, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run of llava-tiny")
    parser.add_argument("--scenes", type=int, default=2000, help="toxic and neutral ones a row")
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--unfamiliar", type=float, help="a share of neutral images, such as 0.03")
    parser.add_argument("--output", type=Path, help="the records as JSON")
    given = parser.parse_args()
    with torch.no_grad():
        ledger = measure(given.run, given.split, given.scenes, given.seed, given.unfamiliar)
    print(tables(ledger, TinyWorld(given.seed, given.split).hard_sets))
    if given.output is not None:
        write_records(given.output, ledger.records, {"title": "Hard sets"}, {})


if __name__ == "__main__":
    main()
