"""The mistakes that a report shows: false positives and the worst misses, each with its reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.guard import VQGuard
from vqguard.judging.verdict import DecidingRegion
from vqguard.recipes.evaluation.pictures import FOLDER, save_png
from vqguard.recipes.evaluation.screened import ScreenedSet
from vqguard.recipes.image_batches import image_features, screen_images
from vqguard.recipes.judging.examples import read_examples
from vqguard.recipes.report.explain import DrawnExamples, Explained, outlined, region_in_picture
from vqguard.safety_map import Verdict

FALSE_POSITIVE, MISS = "false positive", "miss"
MOST = 8
"""Pictures of either kind that a report shows."""


@dataclass(frozen=True)
class Mistake:
    """A screened image about which the guard was wrong."""

    kind: str
    screened: ScreenedSet
    number: int
    """Its place in the set."""
    score: float


def worst_mistakes(
    sets: Sequence[ScreenedSet], verdicts: Iterable[Mapping[str, Any]], judge: str
) -> list[Mistake]:
    """The false positives of the highest scores, then the worst misses; at most `MOST` of each.

    The worst misses are those with the least beside them and the lowest scores, of each category in
    turn.

    Args:
        sets: what was screened.
        verdicts: what a `Ledger` keeps of every verdict.
        judge: the guard's own; verdicts of another play no part.
    """
    false_positives: list[Mistake] = []
    misses: list[Mistake] = []
    given = [verdict for verdict in verdicts if verdict["condition"].get("judge", judge) == judge]
    for screened in sets:
        mine = [verdict for verdict in given if _is_of(verdict, screened)]
        for number, verdict in enumerate(mine):
            if screened.metric == "fpr" and verdict["flagged"]:
                score = verdict["probability"]
                false_positives.append(Mistake(FALSE_POSITIVE, screened, number, score))
            elif screened.metric == "dsr" and not verdict["flagged"]:
                misses.append(Mistake(MISS, screened, number, verdict["probability"]))
    false_positives.sort(key=lambda mistake: -mistake.score)
    return [*false_positives[:MOST], *_in_turn(misses)[:MOST]]


def _is_of(verdict: Mapping[str, Any], screened: ScreenedSet) -> bool:
    condition = {name: value for name, value in verdict["condition"].items() if name != "judge"}
    return bool(verdict["metric"] == screened.metric and condition == screened.condition)


def _in_turn(misses: Sequence[Mistake]) -> list[Mistake]:
    """The worst of each category, then the second worst of each, and so on."""
    taken: Counter[str] = Counter()
    placed = []
    for mistake in sorted(misses, key=_badness):
        category = mistake.screened.category
        placed.append((taken[category], mistake))
        taken[category] += 1
    return [mistake for _, mistake in sorted(placed, key=lambda pair: (pair[0], _badness(pair[1])))]


def _badness(mistake: Mistake) -> tuple[int, float]:
    return mistake.screened.condition.get("distractors", 0), mistake.score


def explain_mistakes(
    run: Path, model: Any, processor: Any, mistakes: Sequence[Mistake]
) -> list[dict[str, Any]]:
    """Draw the mistakes into a run's directory and say why each was made.

    Every picture is made and judged again: images and verdicts are the same each time.

    Returns:
        The report's entries: `kind`, `shown` (what the image is), `file`, `why` (an `Explained` as
        plain values) and `examples`, where the run keeps calibration images: `file`, `labels`.

    Raises:
        ArtefactError: the examples of the run are damaged.
    """
    entries: list[dict[str, Any]] = []
    guard: VQGuard = model.vqguard
    if guard.safety_map is None:
        return entries
    for name in ("mistake-*.png", "example-*.png"):  # of an earlier report
        for old in (run / FOLDER).glob(name):
            old.unlink()
    kept = read_examples(run, guard.safety_map)
    drawn = None if kept is None else DrawnExamples(kept, run / FOLDER)
    for place, mistake in enumerate(mistakes):
        image = next(islice(mistake.screened.images(), mistake.number, None), None)
        if image is None:  # a file that is gone by now
            continue
        [verdict] = screen_images(model, processor, [image])
        region = _region(model, processor, image, verdict)
        box = None
        if region is not None:
            box = region_in_picture(region, image.size, processor.image_processor)
        path = run / FOLDER / f"mistake-{place:02d}.png"
        save_png(outlined(image, box), path)
        why = Explained.of(guard.safety_map, verdict, region, outlined=box is not None)
        examples = [] if drawn is None else drawn.of(verdict.semantic_code)
        entries.append(
            {
                "kind": mistake.kind,
                "shown": mistake.screened.title,
                "file": f"{FOLDER}/{path.name}",
                "why": why.to_dict(),
                "examples": [
                    {"file": f"{FOLDER}/{picture.name}", "labels": list(labels)}
                    for picture, labels in examples
                ],
            }
        )
    return entries


@torch.no_grad()
def _region(
    model: Any, processor: Any, picture: Image.Image, verdict: Verdict
) -> DecidingRegion | None:
    """The region that decided, or, where no threshold was exceeded, the one that scored highest."""
    if verdict.reason is not None:
        return verdict.reason.region
    guard: VQGuard = model.vqguard
    if guard.smooths:  # the verdict is one of its noisy copies'
        return None
    features = image_features(model, processor, [picture])
    if len(features.tokens) != 1:
        return None
    region = guard.region(features.unit_layouts[0], verdict)
    return (
        None if region is None else DecidingRegion(features.unit_parts[0], region.grid, *region.box)
    )
