"""A judge alone, from images to the report: nothing of the model is trained."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqguard.adapters.encoders.stored import holds_encoder
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.evaluation.result import RetrofitResult
from vqguard.recipes.judge_alone.images import JudgeImages, images_of, parts_of
from vqguard.recipes.judge_alone.judged_model import judged_model, save_judge
from vqguard.recipes.judge_alone.measure import measure_judge, rules_of
from vqguard.recipes.judging.both import save_global_map
from vqguard.recipes.judging.examples import ExampleKeeper
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.judging.regional import (
    HALF_WAY,
    LabelledFeatures,
    Shares,
    read_features,
    teach,
)
from vqguard.recipes.run import JUDGE, model_folder
from vqguard.recipes.run_folder import RunFolder, is_guarded
from vqguard.safety_map import SafetyMap

log = logging.getLogger(__name__)

_KMEANS = 25


def judge_alone(
    recipe: JudgeRecipe,
    output: Path,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    command: str,
) -> RetrofitResult:
    """Calibrate a judge from labelled images, and write a run's directory with its report.

    Args:
        recipe: everything that decides the run.
        output: the run's directory.
        resume: an earlier run of the same recipe that was stopped is made whole.
        skip_bad: leave images out that cannot be opened, and list them in the log.
        command: what the records say makes them again.

    Raises:
        ConfigError: `output` is not empty, holds another recipe's run, or is being written by
            another process; no images for a model without a world.
        InputError: as `images_of` and `parts_of`; no threshold within the budget.
        VQGuardError: as loading the model raises it.
    """
    with only_writer(output):
        folder = RunFolder(output, recipe_name=JUDGE)
        folder.refuse_other_runs(recipe, resume=resume)
        rules = rules_of(recipe)
        images = images_of(recipe)
        shares = parts_of(images, recipe, rules).shares
        _check_settings(recipe, rules, images)
        for text in images.warnings:
            log.warning("%s", text)
        folder.open(recipe)
        if not _is_made(output):
            _make(_Making(recipe, rules, images, shares, skip_bad), folder)
        return measure_judge(output, command=command)


@dataclass(frozen=True)
class _Making:
    """What a judge is made of."""

    recipe: JudgeRecipe
    rules: JudgeRules
    images: JudgeImages
    shares: Shares
    skip_bad: bool


def _is_made(run: Path) -> bool:
    folder = model_folder(run)
    return is_guarded(folder) or holds_encoder(folder)


def _check_settings(recipe: JudgeRecipe, rules: JudgeRules, images: JudgeImages) -> None:
    """Refuse what training would refuse minutes from here."""
    count, width = len(images.categories), recipe.guard.regional.width
    if recipe.guard.judge == "regional" and count > width:
        raise ConfigError(
            f"{count} categories do not fit regional.width={width}: give --set "
            f"guard.regional.width={count}"
        )
    rules.require_budget(recipe.regional.fpr)
    if rules.unfamiliar_by == "visual":
        raise ConfigError(
            "rules: unfamiliar_by: visual compares visual tokens with their codewords in the patch "
            "codebook, which a judge alone does not have: use unfamiliar_by: judged, or a full "
            "guard (vqguard retrofit without --levels semantic)"
        )
    rules.settings().require_fit(images.categories, recipe.guard.regional.codes)


def _make(making: _Making, folder: RunFolder) -> None:
    """Model, features, codebooks and maps; the judge is written when all are there."""
    recipe = making.recipe
    loaded = folder.timed("model", lambda: judged_model(recipe, len(making.shares.trained)))
    guard: VQGuard = loaded.model.vqguard
    keeper = ExampleKeeper() if recipe.keep_examples else None
    features, shares = folder.timed("features", lambda: _read(making, loaded, keeper))
    given = guard, features, shares, making
    made = folder.timed("global_judge", lambda: _global_judge(*given, keeper))
    if guard.regional is not None:
        folder.timed(
            "regional_judge",
            lambda: teach(
                guard,
                features,
                shares,
                recipe.regional,
                rules=making.rules,
                seed=recipe.seed,
                checkpoint=folder.path / HALF_WAY,
                keeper=keeper,
            ),
        )
        if made is not None:
            save_global_map(folder.path, made)
    if keeper is not None and guard.safety_map is not None:
        keeper.write(folder.path, guard.safety_map)
    save_judge(folder.path, loaded, recipe)
    (folder.path / HALF_WAY).unlink(missing_ok=True)


def _read(
    making: _Making, loaded: Any, keeper: ExampleKeeper | None
) -> tuple[LabelledFeatures, Shares]:
    """Features of the images that the judge is made of, and the shares by their places in them."""
    numbers = torch.cat(list(making.shares)).tolist()
    read: list[int] = []

    def labelled() -> Iterator[tuple[tuple[str, ...], Image.Image]]:
        opened = making.images.opened(numbers, skip_bad=making.skip_bad)
        for number, picture in tqdm(opened, total=len(numbers), desc="features", unit="image"):
            read.append(number)
            yield making.images.images[number].labels, picture

    features = read_features(loaded.model, loaded.processor, labelled(), keeper)
    place = {number: index for index, number in enumerate(read)}

    def kept(share: Tensor) -> Tensor:
        return torch.tensor([place[n] for n in share.tolist() if n in place], dtype=torch.int64)

    for reason in making.images.skipped:
        log.warning("skipped: %s", reason)
    return features, Shares(*(kept(share) for share in making.shares))


def _global_judge(
    guard: VQGuard,
    features: LabelledFeatures,
    shares: Shares,
    making: _Making,
    keeper: ExampleKeeper | None,
) -> SafetyMap | None:
    """The paper's judge on the same images: k-means, counts, and the threshold of the same budget.

    None where no threshold keeps the budget, unless the guard has no other judge.
    """
    recipe, rules = making.recipe, making.rules
    rows = torch.cat([features.semantic[n] for n in shares.trained.tolist()])
    guard.semantic.codebook.start_from(rows, seed=recipe.seed, iterations=_KMEANS)
    used = torch.cat([shares.trained, shares.counted])
    counted = features.judged(guard, used, "semantic")
    labels = [features.labels[n] for n in used.tolist()]
    own = guard.regional is None
    if own and keeper is not None:
        keeper.choose(counted, labels, used.tolist())
    try:
        made = SafetyMap.calibrate(
            counted.codes,
            labels,
            mask=counted.mask,
            semantic_codes=guard.semantic.codebook.codes,
            tau=recipe.regional.tau,
            rule="any",
            prior="balanced",
            judging=rules.settings(),
            codebook_checksum=guard.checksum("semantic"),
        )
        if recipe.regional.fpr is not None:
            held_out = features.judged(guard, shares.held_out, "semantic")
            made = made.with_budget(
                recipe.regional.fpr,
                held_out.codes,
                held_out.mask,
                thresholds=rules.budget,
                shares=rules.shares,
            )
    except InputError as error:
        if own:
            raise
        log.warning("the global judge has no map to stand beside the regional one: %s", error)
        return None
    if own:
        guard.safety_map = made
    return made
