"""Calibration: semantic codes of labelled images become the safety map. No gradient."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.adapters.features import pad_semantic
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.new_map import replace_map
from vqguard.errors import ImageError, InputError
from vqguard.guard import VQGuard
from vqguard.images import iter_images, open_image
from vqguard.paper import PAPER_TAU
from vqguard.recipes.image_batches import batches, image_features, pixel_count
from vqguard.recipes.run import model_folder, open_run
from vqguard.safety_map import NEUTRAL, SafetyMap
from vqguard.verdict_rules import PAPER_RULE, verdict_rule


@dataclass
class CalibrationResult:
    """A new map, how many images of each category made it, and which files were skipped."""

    map: SafetyMap
    images: dict[str, int]
    skipped: list[str] = field(default_factory=list)


@torch.no_grad()
def calibrate_model(
    model: Any,
    processor: Any,
    images: Iterable[tuple[str, Image.Image]],
    *,
    tau: float | None,
    fpr: float | None,
    rule: str = PAPER_RULE,
    seed: int = 0,
) -> CalibrationResult:
    """Give a guarded model its safety map.

    Args:
        images: (category, image) pairs, `neutral` among the categories.
        tau, fpr: the threshold or the false-positive budget; exactly one.
        rule: what is compared with the threshold, a name of `vqguard.verdict_rules`.

    Raises:
        InputError: no images, no such rule, or no threshold within the budget.
    """
    verdict_rule(rule)  # before the images are read
    guard: VQGuard = model.vqguard
    codes: list[torch.Tensor] = []
    labels: list[str] = []
    model.eval()
    for batch in batches(images, lambda labelled: pixel_count(labelled[1])):
        features = image_features(model, processor, [image for _, image in batch])
        units = features.semantic_units
        cells = guard.semantic.encode(torch.cat(units)).cpu()
        codes += cells.split([len(unit) for unit in units])
        labels += [label for label, _ in batch]
    if not codes:
        raise InputError("calibration found no images")
    padded, mask = pad_semantic(codes)
    made = SafetyMap.calibrate(
        padded,
        labels,
        mask=mask,
        rule=rule,
        semantic_codes=guard.config.semantic_codes,
        tau=tau,
        fpr=fpr,
        seed=seed,
        codebook_checksum=guard.checksum("semantic"),
    )
    guard.safety_map = made
    return CalibrationResult(made, {c: labels.count(c) for c in dict.fromkeys(labels)})


def read_categories(
    folder: Path, *, skip_bad: bool, skipped: list[str]
) -> Iterable[tuple[str, Image.Image]]:
    """(category, image) pairs from one folder a category, one of them `neutral`.

    Raises:
        InputError: the folders are not there.
        ImageError: an unusable image, unless `skip_bad`; then it is listed in `skipped`, as
            files that are no images always are.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder. It holds one folder a category.")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if NEUTRAL not in names or len(names) < 2:
        raise InputError(
            f"{folder}: expected one folder a category, one of them called {NEUTRAL!r} and at "
            f"least one toxic; found {', '.join(names) or 'none'}."
        )
    return _walk(folder, names, skip_bad, skipped)


def _walk(
    folder: Path, names: list[str], skip_bad: bool, skipped: list[str]
) -> Iterable[tuple[str, Image.Image]]:
    for name in names:
        for path in iter_images(
            [folder / name], lambda path, reason: skipped.append(f"{path}: {reason}")
        ):
            try:
                image = open_image(path)
            except ImageError as error:
                if not skip_bad:
                    raise ImageError(
                        f"{error}. With --skip-bad the calibration goes on without it."
                    ) from error
                skipped.append(str(error))
                continue
            yield name, image


def calibrate_run(
    run: Path,
    images: Path,
    *,
    fpr: float | None,
    tau: float | None,
    rule: str = PAPER_RULE,
    skip_bad: bool = False,
    base: str | None = None,
) -> CalibrationResult:
    """Give a guarded model on disk a new safety map from the user's images, in its place.

    Args:
        run: a run's directory, or a guarded model's folder, whole or without its base. The guard
            and the manifest that binds it are replaced; nothing else in there is touched.
        images: one folder a category, one of them `neutral`.
        tau, fpr: the threshold or the false-positive budget; neither: the paper's threshold.
        rule: what is compared with the threshold, a name of `vqguard.verdict_rules`.
        base: as for `open_run`.

    Raises:
        InputError: nothing usable there, no such rule, or no threshold within the budget. The old
            map is kept.
        ConfigError: another process writes into `run`.
    """
    if fpr is None and tau is None:
        tau = PAPER_TAU
    skipped: list[str] = []
    labelled = read_categories(images, skip_bad=skip_bad, skipped=skipped)
    with only_writer(run):
        loaded = open_run(run, base=base)
        result = calibrate_model(
            loaded.model, loaded.processor, labelled, tau=tau, fpr=fpr, rule=rule
        )
        replace_map(model_folder(run), result.map)
    result.skipped = skipped
    return result
