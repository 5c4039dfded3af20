"""A run's safety map: read, edited in place, and compared with another over images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.adapters.storage.bound_files import GUARD_FOLDER
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.new_map import replace_map
from vqguard.errors import ArtefactError, ConfigError, ImageError, InputError
from vqguard.guard import VQGuard
from vqguard.images import iter_images, open_image
from vqguard.judging.policies import Policy
from vqguard.judging.settings import CellRule
from vqguard.recipes.image_batches import batches, pixel_count
from vqguard.recipes.run import LoadedRun, model_folder, open_run
from vqguard.safety_map import NEUTRAL, SafetyMap, Verdict
from vqguard.strict import StrictData, raise_problems
from vqguard.text_files import read_yaml


@dataclass(frozen=True)
class MapEdit(StrictData):
    """Changes of a map by hand. What is not named stays."""

    tau: float | None = None
    """The threshold of categories without their own."""
    rule: str | None = None
    """What is compared with the thresholds."""
    thresholds: dict[str, float | None] = field(default_factory=dict)
    """By category or parent; null takes it away."""
    policies: dict[str, Policy | None] = field(default_factory=dict)
    """By category, parent, `unseen` or `unfamiliar`; null takes it away."""
    language: str | None = None
    """Language of the refusals."""
    cells: tuple[CellRule, ...] = ()
    """Cells to forbid or allow, each in place of an earlier rule of the same cell."""
    release: tuple[int, ...] = ()
    """Cells whose verdict is again what the counts say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = sorted({rule.cell for rule in self.cells} & set(self.release))
        if both:
            raise_problems(type(self), [f"cells {both} are ruled and released at once"])

    def apply(self, safety_map: SafetyMap) -> SafetyMap:
        """The changed map. Measured false positives go where they no longer belong to it.

        Raises:
            InputError: for names of categories and cells that are not there.
        """
        old = safety_map.judging
        unknown = sorted(set(self.release) - {rule.cell for rule in old.cells})
        if unknown:
            raise InputError(f"cells {unknown} have no rule to be released from")
        if self.tau is not None or self.rule is not None:
            safety_map = safety_map.with_rule(
                tau=safety_map.tau if self.tau is None else self.tau,
                rule=safety_map.rule if self.rule is None else self.rule,
            )
        replaced = {rule.cell for rule in self.cells} | set(self.release)
        kept = tuple(rule for rule in old.cells if rule.cell not in replaced)
        return safety_map.with_judging(
            thresholds=_without_none({**old.thresholds, **self.thresholds}),
            policies=_without_none({**old.policies, **self.policies}),
            language=old.language if self.language is None else self.language,
            cells=tuple(sorted((*kept, *self.cells), key=lambda rule: rule.cell)),
        )


def read_policies(path: Path) -> dict[str, Policy | None]:
    """Policies by category from a YAML file. Raises ConfigError naming the file."""
    document = read_yaml(path)
    try:
        return dict(MapEdit.from_dict({"policies": document}).policies)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}", error.problems) from error


def read_map(run: Path) -> SafetyMap:
    """The safety map of a run's directory, or of a guarded model's folder.

    Raises:
        ArtefactError: there is none.
    """
    safety_map = VQGuard.from_pretrained(model_folder(run) / GUARD_FOLDER).safety_map
    if safety_map is None:
        raise ArtefactError(
            f"{run} has no safety map. Give it one with `vqguard calibrate {run} --images DIR`"
        )
    return safety_map


def edit_map(run: Path, edit: MapEdit) -> tuple[SafetyMap, SafetyMap]:
    """Change the map of a run in its place, manifest and all; gives the old and the new one.

    Raises:
        ArtefactError: there is none.
        ConfigError: another process writes into `run`.
        InputError: as `MapEdit.apply`.
    """
    with only_writer(run):
        old = read_map(run)
        new = edit.apply(old)
        replace_map(model_folder(run), new)
    return old, new


@dataclass(frozen=True)
class Flip:
    """An image about which two maps say different things."""

    path: Path
    before: Verdict
    after: Verdict


@dataclass
class MapDiff:
    """What changes over some images."""

    images: int = 0
    flips: list[Flip] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def diff_maps(
    run: Path,
    other: SafetyMap,
    images: Sequence[Path],
    *,
    skip_bad: bool,
    base: str | None = None,
) -> MapDiff:
    """Judge images by the map of a run and by another map of the same codebook.

    `base` as for `open_run`.

    Raises:
        ChecksumError: the other map was made for another codebook.
        ImageError: an unusable image, unless `skip_bad`.
        InputError: no images.
    """
    loaded = open_run(run, base=base)
    guard: VQGuard = loaded.model.vqguard
    own = guard.safety_map
    guard.safety_map = other  # refused here, before an image is read
    diff = MapDiff()
    for batch in batches(
        _opened(images, skip_bad, diff.skipped), lambda item: pixel_count(item[1])
    ):
        pictures = [picture for _, picture in batch]
        before = _judged(loaded, own, pictures)
        after = _judged(loaded, other, pictures)
        diff.images += len(batch)
        diff.flips += [
            Flip(path, old, new)
            for (path, _), old, new in zip(batch, before, after, strict=True)
            if (old.category, old.action) != (new.category, new.action)
        ]
    if not diff.images:
        raise InputError(f"no images in {', '.join(map(str, images))}: nothing was compared")
    return diff


def changed_map(safety_map: SafetyMap, **changes: Any) -> SafetyMap:
    """The map with another `tau` or `rule`, where they are not None."""
    given = {name: value for name, value in changes.items() if value is not None}
    return safety_map.with_rule(**given) if given else safety_map


def described(verdict: Verdict) -> str:
    """A verdict in a few words."""
    if verdict.category == NEUTRAL:
        return NEUTRAL
    return f"{verdict.category} ({verdict.action}, {verdict.probability:.2f})"


def cell_rows(safety_map: SafetyMap) -> list[dict[str, Any]]:
    """One row a cell that holds evidence or has a rule: verdict, score, counts, and the rule."""
    names = (*safety_map.categories, NEUTRAL)
    rules = {rule.cell: rule for rule in safety_map.judging.cells}
    verdicts = safety_map.judge(torch.arange(safety_map.cells)[:, None])
    return [
        {
            "cell": cell,
            "category": verdicts[cell].category,
            "action": verdicts[cell].action,
            "score": float(safety_map.scores[cell]),
            "counts": {n: int(c) for n, c in zip(names, safety_map.counts[cell], strict=True) if c},
            "rule": rules[cell].to_dict() if cell in rules else None,
        }
        for cell in range(safety_map.cells)
        if float(safety_map.evidence[cell].sum()) > 0 or cell in rules
    ]


def category_rows(safety_map: SafetyMap) -> list[dict[str, Any]]:
    """One row a category: its images, threshold, parent and policy."""
    judging = safety_map.judging
    counted = safety_map.counts.sum(dim=0).tolist()
    return [
        {
            "category": name,
            "counted": counted[column],
            "threshold": safety_map.thresholds[name],
            "parent": judging.parents.get(name),
            "policy": judging.policy(name).to_dict(),
        }
        for column, name in enumerate(safety_map.categories)
    ]


def _judged(run: LoadedRun, safety_map: SafetyMap | None, images: list[Image.Image]) -> list[Any]:
    run.model.vqguard.safety_map = safety_map
    return run.screen_images(images)


def _opened(
    paths: Sequence[Path], skip_bad: bool, skipped: list[str]
) -> Iterable[tuple[Path, Image.Image]]:
    for path in iter_images(paths):
        try:
            yield path, open_image(path)
        except ImageError as error:
            if not skip_bad:
                raise ImageError(f"{error}. With --skip-bad the others are compared.") from error
            skipped.append(str(error))


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
