"""Verdict rules: what a semantic cell scores, and what an image scores by its semantic tokens.

A safety map counts; its rule says what the counts mean. The map compares an image's score with its
threshold tau. A new rule is one subclass of `VerdictRule` and its name in the table below; from
outside the package the name is given by `register_verdict_rule`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError


class CountedCells(Protocol):
    """What a rule reads of a safety map: K cells, C toxic categories, the last column neutral."""

    @property
    def categories(self) -> tuple[str, ...]:
        """The C toxic categories."""

    @property
    def counts(self) -> Tensor:
        """(K, C + 1) int64 calibration images per cell and category."""

    @property
    def probabilities(self) -> Tensor:
        """(K, C + 1) float64 P(c|k) under the map's prior; a row of zeros for an empty cell."""


class VerdictRule(ABC):
    """From counts to cell scores, and from the scores of an image's tokens to the image's.

    Scores lie in [0, 1]; more is worse. Stateless: one object serves every map.
    """

    @abstractmethod
    def cell_scores(self, cells: CountedCells) -> Tensor:
        """(K,) floating: how bad a token of each cell is."""

    def category_scores(self, cells: CountedCells) -> Tensor:
        """(K, C) floating: how bad a token of each cell is by each category's own threshold.

        Read where a map has thresholds a category, and to tell which categories an image shows. By
        default a cell's score is its most probable toxic category's, and 0 for the others.
        """
        toxic = cells.probabilities[:, :-1]
        scores = score_cells(self, cells).to(toxic.dtype)
        return torch.zeros_like(toxic).scatter(1, toxic.argmax(dim=1)[:, None], scores[:, None])

    @abstractmethod
    def image_score(self, scores: Tensor, mask: Tensor) -> Tensor:
        """(B,) floating from the cell scores of its tokens (B, S).

        `mask` (B, S) bool is True for real tokens, of which every image has at least one. What
        stands at padding is NaN when a map asks, so that a rule that reads it is refused.
        """


class WorstToken(VerdictRule):
    """An image is as bad as its worst semantic token."""

    def image_score(self, scores: Tensor, mask: Tensor) -> Tensor:
        """The maximum over real tokens.

        Raises:
            InputError: as `require_scores` does.
        """
        require_scores(scores, mask)
        return scores.masked_fill(~mask, -math.inf).amax(dim=1)


class MostProbableCategory(WorstToken):
    """The paper's (arXiv 2511.16229): P of the most probable category, if that is a toxic one.

    A tie with neutral counts as toxic. A cell with equally many guns and knives and nothing else
    scores 0.5.
    """

    def cell_scores(self, cells: CountedCells) -> Tensor:
        """max_c P(c|k) over toxic c; 0 where neutral is more probable."""
        return self.category_scores(cells).amax(dim=1)

    def category_scores(self, cells: CountedCells) -> Tensor:
        """P(c|k) of each toxic c; 0 where neutral is more probable."""
        toxic, neutral = cells.probabilities[:, :-1], cells.probabilities[:, -1:]
        return torch.where(toxic >= neutral, toxic, 0.0)


class AnyToxic(WorstToken):
    """All toxic categories together."""

    def cell_scores(self, cells: CountedCells) -> Tensor:
        """1 - P(neutral|k); 0 for a cell without toxic images."""
        toxic, neutral = cells.probabilities[:, :-1], cells.probabilities[:, -1]
        return torch.where(toxic.amax(dim=1) > 0, 1.0 - neutral, 0.0)


PAPER_RULE = "category"
_RULES: dict[str, VerdictRule] = {PAPER_RULE: MostProbableCategory(), "any": AnyToxic()}


def register_verdict_rule(name: str, rule: VerdictRule) -> None:
    """Make `rule` known as `name`, which is what guards and recipes are saved with.

    It must be registered again before a guard with this rule is loaded.

    Raises:
        ConfigError: where the name belongs to another class: a saved guard would be judged by
            another rule than its own.
    """
    if not isinstance(rule, VerdictRule):
        raise ConfigError(f"expected a VerdictRule object, got {rule!r}")
    known = _RULES.get(name)
    if known is not None and type(known) is not type(rule):
        raise ConfigError(
            f"the verdict rule {name!r} is {type(known).__name__} already; choose another name for"
            f" {type(rule).__name__}"
        )
    _RULES[name] = rule


def verdict_rules() -> tuple[str, ...]:
    """Names of all rules that are known now."""
    return tuple(_RULES)


def verdict_rule(name: str) -> VerdictRule:
    """The rule of this name.

    Raises:
        InputError: where there is none.
    """
    rule = _RULES.get(name) if isinstance(name, str) else None
    if rule is None:
        raise InputError(
            f"rule must be one of {verdict_rules()}, got {name!r}; import the module that registers"
            " it (register_verdict_rule) first"
        )
    return rule


def score_cells(rule: VerdictRule, cells: CountedCells) -> Tensor:
    """`rule.cell_scores`, checked: float64 (K,).

    Raises:
        InputError: unless all lie in [0, 1].
    """
    return _checked(rule, "cell_scores", rule.cell_scores(cells), (len(cells.counts),))


def score_categories(rule: VerdictRule, cells: CountedCells) -> Tensor:
    """`rule.category_scores`, checked: float64 (K, C).

    Raises:
        InputError: unless all lie in [0, 1].
    """
    scores = rule.category_scores(cells)
    shape = (len(cells.counts), len(cells.categories))
    return _checked(rule, "category_scores", scores, shape)


def score_images(rule: VerdictRule, scores: Tensor, mask: Tensor) -> Tensor:
    """`rule.image_score`, checked: float64 (B,) from scores (B, S) and mask (B, S) bool.

    The rule is shown NaN in place of padding.

    Raises:
        InputError: as `require_scores` does, and unless all image scores lie in [0, 1].
    """
    require_scores(scores, mask)
    shown = scores.masked_fill(~mask, math.nan)
    return _checked(rule, "image_score", rule.image_score(shown, mask), (len(scores),))


def require_mask(mask: Tensor, shape: tuple[int, ...]) -> None:
    """Raise InputError unless `mask` is bool of this (B, S) shape, with a real token an image."""
    if mask.dtype != torch.bool or mask.shape != shape:
        raise InputError(
            f"expected a mask of real tokens, bool {tuple(shape)}, got {mask.dtype}"
            f" {tuple(mask.shape)}"
        )
    bare = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if bare:
        raise InputError(f"an image without a semantic token has no verdict: images {bare}")


def require_scores(scores: Tensor, mask: Tensor) -> None:
    """Raise InputError unless every image has a real token, and no real token's score is NaN."""
    require_mask(mask, tuple(scores.shape))
    if bool(scores[mask].isnan().any()):
        raise InputError("the score of a semantic token is NaN: no verdict follows from it")


def _checked(rule: VerdictRule, method: str, scores: Tensor, shape: tuple[int, ...]) -> Tensor:
    if scores.shape != shape or not scores.is_floating_point():
        raise InputError(
            f"{type(rule).__name__}.{method}: expected floating scores of shape {shape}, got"
            f" {tuple(scores.shape)} {scores.dtype}"
        )
    # NaN is in no interval
    if not bool(((scores >= 0.0) & (scores <= 1.0)).all()):
        raise InputError(
            f"{type(rule).__name__}.{method}: expected scores in [0, 1], got"
            f" {scores[~((scores >= 0.0) & (scores <= 1.0))][:3].tolist()}; a rule may not read"
            " tokens outside the mask"
        )
    return scores.double()
