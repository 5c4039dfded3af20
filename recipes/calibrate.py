"""Calibration: semantic codes of labelled images become the safety map. No gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from vqguard.adapters.features import pad_semantic
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.new_map import replace_map
from vqguard.artefact import JudgeLevel
from vqguard.codebooks.guard_output import Judged
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.rules import JudgeRules
from vqguard.paper import PAPER_TAU
from vqguard.recipes.data.labelled_images import labelled_files, open_files
from vqguard.recipes.image_batches import batches, image_features, pixel_count
from vqguard.recipes.judging.examples import ExampleKeeper, forget_examples
from vqguard.recipes.run import model_folder, open_run
from vqguard.safety_map import SafetyMap
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

    Args:
        images: (category, image) pairs, `neutral` among the categories; or several categories.
        tau, fpr: the threshold or the false-positive budget; exactly one.
        rule: what is compared with the threshold, a name of `vqguard.verdict_rules`.
        rules: evidence, thresholds and policies beyond the paper's.
        level: "semantic" makes the map of the global judge, whatever the guard's own is; the guard
            is given it only where that is its own.
        keeper: sees the images, and is told which are nearest to each code.

    Raises:
        InputError: no images, no such rule, or no threshold within the budget.
    """
    verdict_rule(rule)  # before the images are read
    rules.require_budget(fpr)
    guard: VQGuard = model.vqguard
    level = guard.judge_level if level is None else level
    codes: list[torch.Tensor] = []
    distances: list[torch.Tensor] = []
    labels: list[tuple[str, ...]] = []
    model.eval()
    for batch in batches(images, lambda labelled: pixel_count(labelled[1])):
        features = image_features(model, processor, [image for _, image in batch])
        judged = guard.judged(
            features.semantic, features.semantic_mask, features.tokens, features.layouts, level
        )
        if keeper is not None:
            keeper.see(image for _, image in batch)
        own = judged.codes >= 0
        codes += [row[mine].cpu() for row, mine in zip(judged.codes, own, strict=True)]
        if judged.distances is not None:
            distances += [row[mine].cpu() for row, mine in zip(judged.distances, own, strict=True)]
        labels += [(label,) if isinstance(label, str) else label for label, _ in batch]
    if not codes:
        raise InputError("calibration found no images")
    padded, mask = pad_semantic(codes)
    far = pad_semantic(distances)[0] if distances else None
    if keeper is not None:
        keeper.choose(Judged(padded, mask, far), labels)
    made = SafetyMap.calibrate(
        padded,
        labels,
        mask=mask,
        rule=rule,
        semantic_codes=guard.quantizer_of(level).codebook.codes,
        tau=tau,
        fpr=fpr,
        seed=seed,
        prior=rules.prior,
        count=rules.count,
        thresholds=rules.budget,
        shares=rules.shares,
        judging=rules.settings(),
        codebook_checksum=guard.checksum(level),
    )
    if rules.unfamiliar is not None:
        made = made.with_unfamiliar(rules.unfamiliar, cast(torch.Tensor, far), mask)
    if level == guard.judge_level:
        guard.safety_map = made
    return CalibrationResult(made, Counter(name for names in labels for name in names))


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
