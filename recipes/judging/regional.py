"""The regional judge of a guarded model: trained, counted and given its threshold from images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vqguard.adapters.features import pad_semantic
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.evidence import label_columns
from vqguard.judging.settings import JudgeSettings
from vqguard.recipes.image_batches import IMAGES, batches, image_features, pixel_count
from vqguard.recipes.recipe import RegionalRecipe
from vqguard.regional.layout import Layout
from vqguard.regional.training import LabelledTokens, train_regional
from vqguard.safety_map import NEUTRAL, SafetyMap

log = logging.getLogger(__name__)

_RULE = "any"  # all categories together: which of them it is decides nothing about a refusal
_LOGGED = 100  # steps


class Shares(NamedTuple):
    """Which images of a labelled set serve what; their places in it, (n,) int64 each."""

    trained: Tensor
    counted: Tensor
    held_out: Tensor


@dataclass(frozen=True)
class LabelledFeatures:
    """Visual tokens of labelled images, half precision on the CPU."""

    tokens: list[Tensor]
    layouts: list[Layout | None]
    labels: list[tuple[str, ...]]

    def codes(self, guard: VQGuard, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Regional codes (n, S) of the chosen images, and their mask, both on the CPU."""
        if guard.regional is None:
            raise ConfigError("expected a guard with judge: regional")
        read: list[Tensor] = []
        device = guard.judging.codebook.weight.device
        for numbers in batches(chosen.tolist(), most=IMAGES):
            tokens = [self.tokens[n].to(device) for n in numbers]
            regions = guard.regional.regions(tokens, [self.layouts[n] for n in numbers])
            codes = guard.judging.encode(regions.tokens).cpu()
            own = torch.ones_like(codes, dtype=torch.bool)
            own = own if regions.mask is None else regions.mask.cpu()
            read += [row[mine] for row, mine in zip(codes, own, strict=True)]
        codes, mask = pad_semantic(read)
        return codes, torch.ones_like(codes, dtype=torch.bool) if mask is None else mask


@torch.no_grad()
def read_features(
    model: Any, processor: Any, images: Iterable[tuple[str | tuple[str, ...], Image.Image]]
) -> LabelledFeatures:
    """The visual tokens of (category, image) pairs, computed once.

    Raises:
        InputError: no images, or a picture that is several units.
    """
    read = LabelledFeatures([], [], [])
    model.eval()
    for batch in batches(images, lambda labelled: pixel_count(labelled[1])):
        features = image_features(model, processor, [image for _, image in batch])
        if len(features.tokens) != len(batch):
            raise InputError(
                f"{len(batch)} pictures are {len(features.tokens)} units of this model: which of "
                "them shows what a picture is labelled with is not known; use judge: global"
            )
        read.tokens.extend(tokens.to("cpu", torch.float16) for tokens in features.tokens)
        read.layouts.extend(features.unit_layouts)
        read.labels.extend((who,) if isinstance(who, str) else tuple(who) for who, _ in batch)
    if not read.tokens:
        raise InputError("calibration found no images")
    return read


def share_out(labels: Sequence[tuple[str, ...]], recipe: RegionalRecipe, seed: int) -> Shares:
    """Images of each category, drawn by the seed.

    The threshold needs neutral ones alone: toxic images are shared out to training and counting, in
    the same proportion. One of several categories goes with the first of them.

    Raises:
        InputError: for a category of a single image.
    """
    generator = torch.Generator().manual_seed(seed)
    trained: list[Tensor] = []
    counted: list[Tensor] = []
    held_out = torch.empty(0, dtype=torch.int64)
    for category in sorted({names[0] for names in labels}):
        members = torch.tensor([n for n, names in enumerate(labels) if names[0] == category])
        if len(members) < 2:
            raise InputError(
                f"the category {category!r} has one image: one must be learnt from and another"
                " counted; give it more, or use judge: global"
            )
        drawn = members[torch.randperm(len(members), generator=generator)]
        if category == NEUTRAL:
            used = round((recipe.trained + recipe.counted) * len(drawn))
            drawn, held_out = drawn[:used], drawn[used:]
        share = recipe.trained / (recipe.trained + recipe.counted)
        first = min(max(1, round(share * len(drawn))), len(drawn) - 1)
        trained.append(drawn[:first])
        counted.append(drawn[first:])
    return Shares(torch.cat(trained).sort().values, torch.cat(counted).sort().values, held_out)


def train_judge(
    model: Any,
    processor: Any,
    images: Iterable[tuple[str | tuple[str, ...], Image.Image]],
    recipe: RegionalRecipe,
    *,
    seed: int = 0,
) -> SafetyMap:
    """Train the regional judge of a guarded model and give it its safety map.

    Args:
        images: (category, image) pairs, `neutral` among the categories; or several categories.

    Raises:
        ConfigError: the guard's judge is global.
        InputError: too few images, or no threshold within the budget.
    """
    guard: VQGuard = model.vqguard
    if guard.regional is None:
        raise ConfigError("expected a guard with judge: regional, this one judges globally")
    features = read_features(model, processor, images)
    categories = sorted({name for names in features.labels for name in names} - {NEUTRAL})
    shares = share_out(features.labels, recipe, seed)
    marks = label_columns(features.labels, categories)
    trained = LabelledTokens(
        [features.tokens[n] for n in shares.trained.tolist()],
        marks[shares.trained, :-1],
        [features.layouts[n] for n in shares.trained.tolist()],
    )
    guard.safety_map = None
    losses = train_regional(guard.regional, trained, recipe, seed=seed)
    last = losses[-_LOGGED:]
    log.info(
        "regional judge: %d images, loss %.3f in the last %d steps",
        len(shares.trained),
        sum(last) / len(last),
        len(last),
    )
    learned = guard.regional.learned_shares(len(categories))
    counted, mask = features.codes(guard, shares.counted)
    made = SafetyMap.calibrate(
        counted,
        [features.labels[n] for n in shares.counted.tolist()],
        mask=mask,
        semantic_codes=guard.cells,
        count="images",
        rule=_RULE,
        prior="balanced",
        categories=categories,
        judging=JudgeSettings(smoothing=recipe.smoothing, learned=_rows(learned)),
        codebook_checksum=guard.checksum("regional"),
    )
    held_out, held_out_mask = features.codes(guard, shares.held_out)
    made = made.with_budget(recipe.fpr, held_out, held_out_mask)
    guard.safety_map = made
    return made


def _rows(shares: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(share) for share in row) for row in shares)
