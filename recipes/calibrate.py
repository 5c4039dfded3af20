"""Calibration: semantic codes of labelled images become the safety map. No gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.new_map import replace_map
from vqguard.artefact import JudgeLevel
from vqguard.encoder import GuardedEncoder
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.evidence import held_out_half
from vqguard.judging.median import middle_copy
from vqguard.judging.rules import JudgeRules
from vqguard.paper import PAPER_TAU
from vqguard.recipes.data.labelled_images import labelled_files, open_files
from vqguard.recipes.image_batches import (
    batches,
    copied_features,
    image_features,
    pixel_count,
)
from vqguard.recipes.judging.examples import ExampleKeeper, forget_examples
from vqguard.recipes.judging.judged_rows import JudgedRows, chosen_rows, with_unfamiliar
from vqguard.recipes.run import model_folder, open_run
from vqguard.safety_map import NEUTRAL, SafetyMap
from vqguard.verdict_rules import PAPER_RULE, verdict_rule

PAPER_RULES = JudgeRules()


@dataclass
class CalibrationResult:
    """A new map, how many images of each category made it, and which files were skipped."""

    map: SafetyMap
    images: dict[str, int]
    skipped: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """What to mend about the images, although a map could be made of them."""


@torch.no_grad()
def calibrate_model(
    model: Any,
    processor: Any,
    images: Iterable[tuple[str | tuple[str, ...], Image.Image]],
    *,
    tau: float | None,
    fpr: float | None,
    rule: str = PAPER_RULE,
    rules: JudgeRules = PAPER_RULES,
    seed: int = 0,
    level: JudgeLevel | None = None,
    keeper: ExampleKeeper | None = None,
) -> CalibrationResult:
    """Give a guarded model its safety map.

    A guard that judges copies of a picture counts one of them, and takes its threshold by the one
    in the middle, which decides in use: the budget is that of the majority.

    Args:
        images: (category, image) pairs, `neutral` among the categories; or several categories.
        tau, fpr: the threshold or the false-positive budget; exactly one.
        rule: what is compared with the threshold, a name of `vqguard.verdict_rules`.
        rules: evidence, thresholds and policies beyond the paper's.
        seed: of the draw of held-out neutral images, where there is a budget.
        level: "semantic" makes the map of the global judge, whatever the guard's own is; the guard
            is given it only where that is its own.
        keeper: sees the images, and is told which are nearest to each code.

    Raises:
        ConfigError: rules by visual tokens for a judge alone.
        InputError: no images, no such rule, or no threshold within the budget.
    """
    verdict_rule(rule)  # before the images are read
    rules.require_budget(fpr)
    guard: VQGuard = model.vqguard
    level = guard.judge_level if level is None else level
    visual = rules.unfamiliar_by == "visual"
    if visual:
        guard.require_patch_codewords()
    copies: list[JudgedRows] = []
    labels: list[tuple[str, ...]] = []
    model.eval()
    for batch in batches(images, lambda labelled: pixel_count(labelled[1])):
        pictures = [image for _, image in batch]
        if keeper is not None:
            keeper.see(pictures)
        for number, seen in enumerate(_judged_views(model, processor, pictures, level)):
            if number == len(copies):
                copies.append(JudgedRows())
            copies[number].add(
                guard.judged(
                    seen.semantic,
                    seen.semantic_mask,
                    seen.tokens,
                    seen.layouts,
                    level,
                    visual=visual,
                )
            )
        labels += [(label,) if isinstance(label, str) else label for label, _ in batch]
    if not labels:
        raise InputError("calibration found no images")
    views = [rows.together() for rows in copies]
    first = views[0]
    if keeper is not None:
        keeper.choose(first, labels)
    neutral = torch.tensor([names == (NEUTRAL,) for names in labels])
    held_out = held_out_half(neutral & (fpr is not None), seed)
    counted = torch.ones(len(labels), dtype=torch.bool)
    counted[held_out] = False
    kept = chosen_rows(first, counted.nonzero().flatten())
    made = SafetyMap.calibrate(
        kept.codes,
        [names for names, counts in zip(labels, counted.tolist(), strict=True) if counts],
        mask=kept.mask,
        rule=rule,
        semantic_codes=guard.quantizer_of(level).codebook.codes,
        tau=tau,
        prior=rules.prior,
        count=rules.count,
        judging=rules.settings(),
        codebook_checksum=guard.checksum(level),
    )
    middle = middle_copy(made, views)._replace(mask=first.mask)
    if fpr is not None:
        unseen = chosen_rows(middle, held_out)
        made = made.with_budget(
            fpr, unseen.codes, unseen.mask, thresholds=rules.budget, shares=rules.shares
        )
    made = with_unfamiliar(made, rules, middle, labels, guard.checksum("patch"))
    if level == guard.judge_level:
        guard.safety_map = made
    return CalibrationResult(made, Counter(name for names in labels for name in names))


def _judged_views(
    model: Any, processor: Any, pictures: Sequence[Image.Image], level: JudgeLevel
) -> Iterator[VisualFeatures]:
    """Features of what the guard judges: copies in place of the pictures, or the pictures.

    The judge of another level than the guard's own is asked about pictures as they are.
    """
    guard: VQGuard = model.vqguard
    if guard.smooths and level == guard.judge_level and not isinstance(model, GuardedEncoder):
        yield from copied_features(model, processor, pictures)
    else:
        yield image_features(model, processor, pictures)


def calibrate_run(
    run: Path,
    images: Path,
    *,
    fpr: float | None,
    tau: float | None,
    rule: str = PAPER_RULE,
    rules: JudgeRules = PAPER_RULES,
    labels: Path | None = None,
    skip_bad: bool = False,
    base: str | None = None,
    keep_examples: bool = False,
) -> CalibrationResult:
    """Give a guarded model on disk a new safety map from the user's images, in its place.

    Args:
        run: a run's directory, or a guarded model's folder, whole or without its base. The guard
            and the manifest that binds it are replaced; nothing else in there is touched.
        images: one folder a category, one of them `neutral`; or what the paths in `labels` start
            from.
        tau, fpr: the threshold or the false-positive budget; neither: the paper's threshold.
        rule: what is compared with the threshold, a name of `vqguard.verdict_rules`.
        rules: evidence, thresholds and policies beyond the paper's.
        labels: a list of images and their labels (`vqguard.recipes.data.labelled_images`).
        base: as for `open_run`.
        keep_examples: keep small copies of the images nearest to each code beside the run's model,
            for explanations. Those of the old map are removed either way.

    Raises:
        InputError: nothing usable there, no such rule, or no threshold within the budget. The old
            map is kept.
        ConfigError: another process writes into `run`, or examples are to be kept in a model's
            folder.
    """
    if fpr is None and tau is None:
        tau = PAPER_TAU
    if keep_examples and model_folder(run) == run:
        raise ConfigError(
            f"{run} is a model's folder, which is shared as it is: examples are kept in a run's "
            "directory only. Leave --keep-examples out, or name the run"
        )
    keeper = ExampleKeeper() if keep_examples else None
    skipped: list[str] = []
    warnings: list[str] = []
    files = labelled_files(images, labels, skipped, warnings)
    labelled = open_files(files, skip_bad=skip_bad, skipped=skipped)
    with only_writer(run):
        loaded = open_run(run, base=base)
        old = loaded.model.vqguard.safety_map
        if old is not None and (old.judging.policies or old.judging.cells) and not rules.policies:
            warnings.append(
                "the old map had policies or rules of cells, and the new one has none: give them "
                "with --rules, or again by `vqguard map edit`"
            )
        result = calibrate_model(
            loaded.model,
            loaded.processor,
            labelled,
            tau=tau,
            fpr=fpr,
            rule=rule,
            rules=rules,
            keeper=keeper,
        )
        replace_map(model_folder(run), result.map)
        forget_examples(run)
        if keeper is not None:
            keeper.write(run, result.map)
    result.skipped, result.warnings = skipped, warnings
    return result
