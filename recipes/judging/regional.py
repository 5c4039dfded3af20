"""The regional judge of a guarded model: trained, counted and given its threshold from images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from vqguard.adapters.features import VisualFeatures, pad_semantic
from vqguard.artefact import JudgeLevel
from vqguard.codebooks.guard_output import Judged
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.evidence import label_columns
from vqguard.judging.median import middle_copy
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.image_batches import (
    IMAGES,
    batches,
    copied_features,
    labelled_features,
    pixel_count,
    side_by_side,
)
from vqguard.recipes.judging.examples import ExampleKeeper
from vqguard.recipes.judging.judged_rows import JudgedRows, with_unfamiliar
from vqguard.recipes.recipe import RegionalRecipe
from vqguard.regional.layout import Layout
from vqguard.regional.training import LabelledTokens, train_regional
from vqguard.safety_map import NEUTRAL, SafetyMap

log = logging.getLogger(__name__)

HALF_WAY = "regional.safetensors"
"""In a run's directory: the judge's training, until the judge is written."""
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
    """(N_i, d) an image."""
    semantic: list[Tensor]
    """(S_i, d_s) an image, float32: what the global judge reads."""
    layouts: list[Layout | None]
    labels: list[tuple[str, ...]]
    copies: list[LabelledFeatures] = field(default_factory=list)
    """The same of each copy that the guard judges in place of the image (`guard.smoothing`); none
    where it judges images as they are."""

    def add(self, features: VisualFeatures, labels: Sequence[str | tuple[str, ...]]) -> None:
        """Put a batch of labelled images behind the others."""
        self.tokens.extend(tokens.to("cpu", torch.float16) for tokens in features.tokens)
        self.semantic.extend(unit.float().cpu() for unit in features.semantic_units)
        self.layouts.extend(features.unit_layouts)
        self.labels.extend((who,) if isinstance(who, str) else tuple(who) for who in labels)

    def middle(
        self, guard: VQGuard, chosen: Tensor, safety_map: SafetyMap, *, visual: bool = False
    ) -> Judged:
        """`judged`, by the copy in the middle where the guard judges copies.

        `safety_map`: by whose scores copies are compared; its thresholds play no part.
        """
        views = self.copies or [self]
        copies = [view.judged(guard, chosen, visual=visual) for view in views]
        return middle_copy(safety_map, copies)._replace(mask=copies[0].mask)

    def judged(
        self,
        guard: VQGuard,
        chosen: Tensor,
        level: JudgeLevel | None = None,
        *,
        visual: bool = False,
    ) -> Judged:
        """What verdicts on the chosen images are read from, on the CPU; a mask always.

        `level`, `visual`: as `VQGuard.judged` takes them.
        """
        rows = JudgedRows()
        device = guard.judging.codebook.weight.device
        for numbers in batches(chosen.tolist(), most=IMAGES):
            semantic, mask = pad_semantic([self.semantic[n].to(device) for n in numbers])
            tokens = [self.tokens[n].to(device) for n in numbers]
            layouts = [self.layouts[n] for n in numbers]
            rows.add(guard.judged(semantic, mask, tokens, layouts, level, visual=visual))
        return rows.together()


@torch.no_grad()
def read_features(
    model: Any,
    processor: Any,
    images: Iterable[tuple[str | tuple[str, ...], Image.Image]],
    keeper: ExampleKeeper | None = None,
) -> LabelledFeatures:
    """The visual tokens of (category, image) pairs and of their copies, computed once.

    `keeper` sees the images.

    Raises:
        InputError: no images, or a picture that is several units.
    """
    read = LabelledFeatures([], [], [], [])
    model.eval()
    made = partial(labelled_features, model, processor)
    labelled = batches(images, lambda pair: pixel_count(pair[1]))
    for batch, features in side_by_side(model, made, labelled):
        pictures, labels = [image for _, image in batch], [who for who, _ in batch]
        if len(features.tokens) != len(batch):
            raise InputError(
                f"{len(batch)} pictures are {len(features.tokens)} units of this model: which of "
                "them shows what a picture is labelled with is not known; use judge: global"
            )
        if keeper is not None:
            keeper.see(pictures)
        read.add(features, labels)
        for number, seen in enumerate(copied_features(model, processor, pictures)):
            if number == len(read.copies):
                read.copies.append(LabelledFeatures([], [], [], []))
            read.copies[number].add(seen, labels)
    if not read.tokens:
        raise InputError("calibration found no images")
    return read


def share_out(labels: Sequence[tuple[str, ...]], recipe: RegionalRecipe, seed: int) -> Shares:
    """Images of each category, drawn by the seed.

    The threshold needs neutral ones alone: toxic images are shared out to training and counting, in
    the same proportion, and without a budget so are neutral ones. One of several categories goes
    with the first of them.

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
        if category == NEUTRAL and recipe.fpr is not None:
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
    rules: JudgeRules | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    keeper: ExampleKeeper | None = None,
) -> SafetyMap:
    """Train the regional judge of a guarded model and give it its safety map.

    Args:
        images: (category, image) pairs, `neutral` among the categories; or several categories.
        rules: thresholds, policies and hierarchy beyond the recipe's budget.
        checkpoint: a file that keeps the training half way, as `train_regional` takes it.
        keeper: sees the images, and is told which of those that are counted are nearest to a code.

    Raises:
        ConfigError: the guard's judge is global.
        InputError: too few images, or no threshold within the budget.
    """
    guard: VQGuard = model.vqguard
    if guard.regional is None:
        raise ConfigError("expected a guard with judge: regional, this one judges globally")
    features = read_features(model, processor, images, keeper)
    shares = share_out(features.labels, recipe, seed)
    return teach(
        guard,
        features,
        shares,
        recipe,
        rules=rules,
        seed=seed,
        checkpoint=checkpoint,
        keeper=keeper,
    )


def teach(
    guard: VQGuard,
    features: LabelledFeatures,
    shares: Shares,
    recipe: RegionalRecipe,
    *,
    rules: JudgeRules | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    keeper: ExampleKeeper | None = None,
) -> SafetyMap:
    """`train_judge` from features, shared out already; the rest and what is raised as there.

    A guard that judges copies learns from the images and one copy of each, counts a copy of each,
    and has its threshold by the copy in the middle, which decides in use: the budget is that of the
    majority.
    """
    rules = JudgeRules() if rules is None else rules
    rules.require_budget(recipe.fpr)
    if rules.unfamiliar_by == "visual":
        guard.require_patch_codewords()
    if guard.regional is None:
        raise ConfigError("expected a guard with judge: regional, this one judges globally")
    categories = sorted({name for names in features.labels for name in names} - {NEUTRAL})
    seen_as = features.copies[0] if features.copies else features
    trained = _learnt_from(
        [features, *features.copies[:1]],
        label_columns(features.labels, categories)[:, :-1],
        shares.trained,
    )
    guard.safety_map = None
    with tqdm(total=recipe.steps, desc="regional judge") as bar:

        def show(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()

        losses = train_regional(
            guard.regional, trained, recipe, seed=seed, each_step=show, checkpoint=checkpoint
        )
    last = losses[-_LOGGED:]
    log.info(
        "regional judge: %d images, loss %.3f in the last %d steps",
        len(shares.trained),
        sum(last) / len(last),
        len(last),
    )
    learned = guard.regional.learned_shares(len(categories))
    counted = seen_as.judged(guard, shares.counted)
    labels = [features.labels[n] for n in shares.counted.tolist()]
    if keeper is not None:
        keeper.choose(counted, labels, shares.counted.tolist())
    made = SafetyMap.calibrate(
        counted.codes,
        labels,
        mask=counted.mask,
        semantic_codes=guard.cells,
        count="images",
        tau=recipe.tau,
        rule=_RULE,
        prior="balanced",
        categories=categories,
        judging=replace(rules.settings(), smoothing=recipe.smoothing, learned=_rows(learned)),
        codebook_checksum=guard.checksum("regional"),
    )
    if recipe.fpr is not None:
        held_out = features.middle(guard, shares.held_out, made)
        made = made.with_budget(
            recipe.fpr, held_out.codes, held_out.mask, thresholds=rules.budget, shares=rules.shares
        )
    if rules.unfamiliar is not None:
        unseen = torch.cat([shares.counted, shares.held_out])
        by_visual = rules.unfamiliar_by == "visual"
        made = with_unfamiliar(
            made,
            rules,
            features.middle(guard, unseen, made, visual=by_visual),
            [features.labels[n] for n in unseen.tolist()],
            guard.checksum("patch"),
        )
    guard.safety_map = made
    return made


def _learnt_from(
    views: Sequence[LabelledFeatures], marks: Tensor, chosen: Tensor
) -> LabelledTokens:
    """The chosen images in each of these views."""
    numbers = chosen.tolist()
    return LabelledTokens(
        [view.tokens[n] for view in views for n in numbers],
        marks[chosen].repeat(len(views), 1),
        [view.layouts[n] for view in views for n in numbers],
    )


def _rows(shares: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(share) for share in row) for row in shares)
