"""What each semantic cell scores, and the verdicts on images that follow from it.

Which category names a verdict, where several thresholds are exceeded: "unfamiliar" where the map
says that it comes first; else the one with the strictest policy; among these "unfamiliar" before
all others (what is far from every codeword is not known to be anything else) and "unseen" after
them; then the one that exceeds its threshold the most; then that of the first token, and the first
category of the map. The others are named in the reason. What is done is what the strictest policy
asks for, whichever category names the verdict: what somebody makes look strange is not let through.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vqguard.judging.evidence import NEUTRAL
from vqguard.judging.policies import UNFAMILIAR, UNSEEN, severity
from vqguard.judging.settings import JudgeSettings
from vqguard.judging.verdict import Reason, Verdict
from vqguard.verdict_rules import (
    CountedCells,
    VerdictRule,
    score_categories,
    score_cells,
    score_images,
)

# margins of what is not compared with a score; those of scores lie in (0, 1]
_UNSEEN, _FORBIDDEN, _UNFAMILIAR = 0.0, 2.0, 3.0


class _Exceeded(NamedTuple):
    """Which thresholds B images exceed: columns are the C categories, unseen, unfamiliar."""

    over: Tensor
    """(B, C + 2) bool."""
    margin: Tensor
    """(B, C + 2) float64, by how much."""
    score: Tensor
    """(B, C + 2) float64, what is compared."""
    token: Tensor
    """(B, C + 2) int64, which token decides."""


class Distant(NamedTuple):
    """How far B images are from what codebooks know; None where that is not known."""

    judged: Tensor | None = None
    """(B, S) float64, each judged token's distance to its codeword."""
    visual: Tensor | None = None
    """(B,) float64, the distance of each image's visual tokens to their codewords."""


class CellTable(NamedTuple):
    """K cells, C categories, all on the CPU; codes (B, S) and masks are checked by the map."""

    rule: VerdictRule
    categories: tuple[str, ...]
    tau: float
    thresholds: Tensor | None
    """(C,) float64; None: tau for all, compared with the rule's own image score."""
    scores: Tensor
    """(K,) float64, the rule's."""
    category_scores: Tensor
    """(K, C) float64, the rule's."""
    named: Tensor
    """(K,) int64: a cell's most probable toxic category."""
    likeliest: Tensor
    """(K,) float64: P of it."""
    forbidden: Tensor
    """(K, C) bool: flagged by hand, whatever the score."""
    unseen: Tensor
    """(K,) bool: flagged for being empty."""
    distance: float
    """Above it an image is unfamiliar; infinite: none is."""
    visual: bool
    """Whether that is compared with its visual tokens' distance, not with judged tokens."""
    first: bool
    """Whether "unfamiliar" names a verdict before all else; the strictest policy acts as ever."""
    actions: tuple[str, ...]
    """(C + 2,) what is done: of each category, unseen, unfamiliar."""

    def without_fixed_cells(self) -> CellTable:
        """The same where scores alone decide: no cell is flagged by hand or for being empty."""
        return self._replace(unseen=self.unseen & False, forbidden=self.forbidden & False)

    def image_scores(self, codes: Tensor, mask: Tensor) -> Tensor:
        """(B,) float64: the rule's image score; infinite where tau plays no part."""
        images = score_images(self.rule, self.scores[codes], mask)
        fixed = self.unseen | self.forbidden.any(dim=1)
        return images.masked_fill((fixed[codes] & mask).any(dim=1), math.inf)

    def category_images(self, codes: Tensor, mask: Tensor) -> Tensor:
        """(B, C) float64: the image score by each category; infinite for a forbidden cell."""
        cells = self.category_scores[codes]
        columns = [score_images(self.rule, cells[..., c], mask) for c in range(cells.shape[2])]
        forbidden = (self.forbidden[codes] & mask[..., None]).any(dim=1)
        return torch.stack(columns, dim=1).masked_fill(forbidden, math.inf)

    def flagged(self, codes: Tensor, mask: Tensor, distant: Distant) -> Tensor:
        """(B,) bool: which images have a policy other than to report."""
        acts = torch.tensor([action != "report" for action in self.actions])
        far = self._far(mask, distant)[0] > self.distance
        if self.thresholds is None and bool(acts[:-1].all()):
            # every category alike: the rule's own score says it, in a few operations
            over = self.image_scores(codes, mask) > self.tau
        else:
            over = (self._exceeded(codes, mask, distant).over & acts)[:, :-1].any(dim=1)
        return over | far if bool(acts[-1]) else over

    def judge(self, codes: Tensor, mask: Tensor, distant: Distant, version: str) -> list[Verdict]:
        """One verdict an image; `version` of the map goes into the reasons."""
        exceeded = self._exceeded(codes, mask, distant)
        scores = self.scores[codes]
        worst = scores.masked_fill(~mask, -math.inf).argmax(dim=1)
        pooled = score_images(self.rule, scores, mask)
        names, verdicts = (*self.categories, UNSEEN, UNFAMILIAR), []
        for row in range(len(codes)):
            columns = self._exceeding(exceeded, row)
            column = columns[0] if columns else None
            token = int(worst[row]) if column is None else int(exceeded.token[row, column])
            own, code = mask[row], int(codes[row, token])
            position = int(own[:token].sum())
            category, reason, shown = NEUTRAL, None, float(pooled[row])
            if column is not None:
                category, *others = (names[number] for number in columns)
                score, threshold = float(exceeded.score[row, column]), self._threshold(column)
                action = max((self.actions[number] for number in columns), key=severity)
                also = tuple(others)
                reason = Reason(
                    category, score, threshold, position, code, action, version, also=also
                )
                shown = shown if category == UNFAMILIAR else score
            verdicts.append(
                Verdict(
                    reason is not None and reason.action != "report",
                    category,
                    shown if shown > 0 else float(self.likeliest[code]),
                    code,
                    position,
                    tuple(codes[row, own].tolist()),
                    tuple(scores[row, own].tolist()),
                    reason,
                )
            )
        return verdicts

    def _far(self, mask: Tensor, distant: Distant) -> tuple[Tensor, Tensor | None]:
        """(B,) float64, what is compared with the distance, and the (B,) tokens that say it.

        None of them where all of the image does; minus infinity where nothing is known.
        """
        if self.visual:
            images = distant.visual
            nothing = torch.full((len(mask),), -math.inf, dtype=torch.float64)
            return (nothing if images is None else images.double()), None
        far = torch.full(mask.shape, -math.inf, dtype=torch.float64)
        if distant.judged is not None:
            far = distant.judged.double().masked_fill(~mask, -math.inf)
        return far.amax(dim=1), far.argmax(dim=1)

    def _exceeded(self, codes: Tensor, mask: Tensor, distant: Distant) -> _Exceeded:
        cells = self.category_scores[codes].masked_fill(~mask[..., None], -math.inf)
        cells = cells.masked_fill(self.forbidden[codes] & mask[..., None], math.inf)
        images, token = self.category_images(codes, mask), cells.argmax(dim=1)
        if self.thresholds is None:
            images, token = self._by_the_rule(codes, mask, images, token)
            thresholds = torch.full_like(images, self.tau)
        else:
            thresholds = self.thresholds.expand_as(images)
        unseen = self.unseen[codes] & mask
        far, furthest_token = self._far(mask, distant)
        if furthest_token is None:  # the verdict speaks of the worst
            furthest_token = self.scores[codes].masked_fill(~mask, -math.inf).argmax(dim=1)
        furthest = far[:, None]
        over = [images > thresholds, unseen.any(dim=1, keepdim=True), furthest > self.distance]
        margin = [
            (images - thresholds).clamp_max(_FORBIDDEN),
            torch.full_like(furthest, _UNSEEN),
            torch.full_like(furthest, _UNFAMILIAR),
        ]
        score = [images.clamp_max(1.0), torch.zeros_like(furthest), furthest]
        first = unseen.int().argmax(dim=1, keepdim=True)
        tokens = [token, first, furthest_token[:, None]]
        return _Exceeded(*(torch.cat(parts, dim=1) for parts in (over, margin, score, tokens)))

    def _by_the_rule(
        self, codes: Tensor, mask: Tensor, images: Tensor, token: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, C) category scores and tokens where one tau is compared with the rule's own score.

        That says whether; which category, and by which token, its worst token says.
        """
        scores = self.scores[codes]
        pooled = score_images(self.rule, scores, mask)[:, None]
        worst = scores.masked_fill(~mask, -math.inf).argmax(dim=1, keepdim=True)
        named = self.named[codes.gather(1, worst)]
        by_hand, loud = images.isinf(), pooled > self.tau
        images = images.where(loud, 0.0).scatter(1, named, pooled)
        token = torch.where(by_hand, token, token.scatter(1, named, worst))
        return images.masked_fill(by_hand, math.inf), token

    def _exceeding(self, exceeded: _Exceeded, row: int) -> list[int]:
        """The columns whose thresholds an image exceeds; the first names its verdict."""
        unfamiliar = len(self.actions) - 1
        return sorted(
            exceeded.over[row].nonzero().flatten().tolist(),
            key=lambda column: (
                not (self.first and column == unfamiliar),
                -severity(self.actions[column]),
                -float(exceeded.margin[row, column]),
                int(exceeded.token[row, column]),
                column,
            ),
        )

    def _threshold(self, column: int) -> float:
        if column == len(self.categories) + 1:
            return self.distance
        if column == len(self.categories) or self.thresholds is None:
            return self.tau
        return float(self.thresholds[column])


def make_table(
    rule: VerdictRule, cells: CountedCells, tau: float, settings: JudgeSettings, unseen: Tensor
) -> CellTable:
    """The table of a map's cells; `unseen` (K,) bool says which are flagged for being empty.

    Raises:
        InputError: where the rule's scores do not lie in [0, 1].
    """
    toxic = cells.probabilities[:, :-1]
    scores, category_scores = (
        score_cells(rule, cells).clone(),
        score_categories(rule, cells).clone(),
    )
    named, unseen = toxic.argmax(dim=1), unseen.clone()
    forbidden = torch.zeros_like(category_scores, dtype=torch.bool)
    for by_hand in settings.cells:
        cell, forbids = by_hand.cell, by_hand.verdict == "forbid"
        scores[cell], category_scores[cell], unseen[cell] = float(forbids), 0.0, False
        if forbids:
            named[cell] = cells.categories.index(by_hand.category)
            forbidden[cell, named[cell]] = True
    own = [settings.threshold(name, tau) for name in cells.categories]
    far = settings.unfamiliar
    names = (*cells.categories, UNSEEN, UNFAMILIAR)
    return CellTable(
        rule=rule,
        categories=cells.categories,
        tau=tau,
        thresholds=torch.tensor(own, dtype=torch.float64) if settings.thresholds else None,
        scores=scores,
        category_scores=category_scores,
        named=named,
        likeliest=toxic.amax(dim=1),
        forbidden=forbidden,
        unseen=unseen,
        distance=math.inf if far is None else far.distance,
        visual=far is not None and far.by == "visual",
        first=far is not None and far.first,
        actions=tuple(settings.policy(name).action for name in names),
    )
