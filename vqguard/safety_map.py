"""Semantic code -> verdict: calibration counts, the rule that reads them, and its threshold.

The paper (arXiv 2511.16229): D[k][c] counts the calibration images of category c in semantic cell
k, P(c|k) = D[k][c] / sum_c' D[k][c'], and a cell is toxic if its most probable category is a toxic
one with P(c|k) > tau. The counts are kept as integers, so that the rule (`vqguard.verdict_rules`)
can change later without the images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NoReturn

import torch
from torch import Tensor

from vqguard.errors import ArtefactError, InputError
from vqguard.judging.budget import ALL_CATEGORIES, choose_distance, choose_thresholds
from vqguard.judging.cell_table import CellTable, Distant, make_table
from vqguard.judging.codes import (
    as_tokens,
    require_codes,
    require_distances,
    require_visual,
)
from vqguard.judging.evidence import (
    NEUTRAL,
    CountOf,
    Labels,
    count_images,
    held_out_half,
    label_columns,
    probabilities,
)
from vqguard.judging.policies import UNFAMILIAR, UNSEEN, lineage
from vqguard.judging.settings import PAPER_JUDGE, JudgeSettings
from vqguard.judging.thresholds import FalsePositives, roc_curve
from vqguard.judging.verdict import Reason, Verdict
from vqguard.paper import PAPER_TAU
from vqguard.strict import Must, StrictData
from vqguard.verdict_rules import (
    PAPER_RULE,
    require_mask,
    verdict_rule,
    verdict_rules,
)

__all__ = ["NEUTRAL", "UNFAMILIAR", "UNSEEN", "Reason", "SafetyMap", "Verdict"]

_SCHEMA = 1
_RULE = ("tau", "rule", "prior", "empty")
_MEASURED = ("smoothing", "thresholds", "hierarchy", "cells", "toxic", "text")
"""The parts of `judging` that false positives depend on."""
Thresholds = Literal["one", "category", "parent"]


@dataclass(frozen=True, eq=False)
class SafetyMap:
    """Calibration counts and a rule. Immutable; `with_rule` gives a map with another rule.

    Decisions where the paper is silent: a tie between a toxic category and neutral counts as toxic
    (fail closed), between toxic ones the first of `categories` is named; a cell without calibration
    images is neutral unless `empty="flag"`.
    """

    categories: tuple[str, ...]
    """Toxic categories, C of them; neutral is not among them."""
    counts: Tensor
    """(K, C + 1) int64 images per cell and category, the last column neutral."""
    tau: float = PAPER_TAU
    """Threshold in [0, 1); a score must exceed it (paper: 0.6)."""
    rule: str = PAPER_RULE
    """What is compared with tau, a name known to `vqguard.verdict_rules`: "category" (the most
    probable toxic category, as in the paper), "any" (all of them together), or a rule of your own.
    """
    prior: Literal["counts", "balanced"] = "counts"
    """"counts": as counted (paper). "balanced": as if every category had as many images."""
    empty: Literal["neutral", "flag"] = "neutral"
    """Verdict of a cell in which no calibration image fell."""
    codebook_checksum: str = ""
    """`VQGuard.checksum("semantic")` of the codebook; a guard refuses a map without it."""
    false_positives: FalsePositives | None = None
    """How the thresholds were chosen, where they were chosen by a false-positive budget."""
    judging: JudgeSettings = PAPER_JUDGE
    """Evidence, thresholds and policies beyond the paper's."""

    def __post_init__(self) -> None:
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise InputError(f"expected distinct toxic categories, got {self.categories}")
        kept = {NEUTRAL, UNSEEN, UNFAMILIAR}
        if kept & set(self.categories):
            raise InputError(f"{sorted(kept)} are no toxic categories, got {self.categories}")
        counts = self.counts
        if counts.dim() != 2 or counts.shape[0] < 1 or counts.dtype != torch.int64:
            raise InputError(
                f"expected int64 counts of shape (K, {len(self.categories) + 1}), got"
                f" {tuple(counts.shape)} {counts.dtype}"
            )
        if counts.shape[1] != len(self.categories) + 1:
            raise InputError(
                f"{len(self.categories)} categories and neutral need {len(self.categories) + 1}"
                f" columns of counts, got {counts.shape[1]}"
            )
        if int(counts.min()) < 0:
            raise InputError("counts of images cannot be negative")
        if not 0.0 <= self.tau < 1.0:
            raise InputError(f"tau must lie in [0, 1), got {self.tau}")
        verdict_rule(self.rule)
        for name, allowed in (
            ("prior", ("counts", "balanced")),
            ("empty", ("neutral", "flag")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self.judging.require_fit(self.categories, self.cells)
        # the map does not change when the caller's tensor does
        object.__setattr__(self, "counts", counts.detach().cpu().clone())

    @property
    def cells(self) -> int:
        """Number of semantic cells K."""
        return self.counts.shape[0]

    @cached_property
    def version(self) -> str:
        """SHA-256 of what `to_dict` gives: what a verdict names as the map that judged."""
        text = json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def evidence(self) -> Tensor:
        """(K, C + 1) float64: the counts, and beside them what prompts say of each cell."""
        text = self.judging.text
        counts = self.counts.double()
        return counts if text is None else counts + torch.tensor(text.counts, dtype=counts.dtype)

    @cached_property
    def probabilities(self) -> Tensor:
        """P(c|k): float64 (K, C + 1), last column neutral; a row of zeros for an empty cell."""
        toxic = None
        if self.judging.toxic is not None:
            said = (self.evidence - self.counts)[:, :-1].sum(dim=1)
            toxic = torch.tensor(self.judging.toxic) + said
        rows = self.judging.learned
        learned = None if rows is None else torch.tensor(rows, dtype=torch.float64)
        return probabilities(self.evidence, self.prior, self.judging.smoothing, toxic, learned)

    @cached_property
    def scores(self) -> Tensor:
        """What the rule gives each cell, 0 to 1: float64 (K,). By hand: 0 allowed, 1 forbidden."""
        return self._table.scores

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """The threshold of each toxic category."""
        return {name: self.judging.threshold(name, self.tau) for name in self.categories}

    @cached_property
    def flagged_cells(self) -> Tensor:
        """Bool (K,): the cells that are refused where an image has one token alone."""
        return self.flagged(torch.arange(self.cells)[:, None])

    @cached_property
    def _table(self) -> CellTable:
        unseen = (self.evidence.sum(dim=1) == 0) & (self.empty == "flag")
        return make_table(verdict_rule(self.rule), self, self.tau, self.judging, unseen)

    def category_of(self, code: int) -> str:
        """Category of a semantic cell: a toxic one, "unseen" or "neutral"."""
        return self.judge(torch.tensor([[code]]))[0].category

    def flagged(
        self,
        codes: Tensor,
        mask: Tensor | None = None,
        distances: Tensor | None = None,
        visual: Tensor | None = None,
    ) -> Tensor:
        """Bool (B,), on the device of `codes`: which images are flagged. Arguments as `judge`."""
        device = codes.device
        codes, mask, distances = require_codes(codes, mask, distances, cells=self.cells)
        visual = None if visual is None else require_visual(visual, len(codes))
        return self._table.flagged(codes, mask, Distant(distances, visual)).to(device)

    def judge(
        self,
        codes: Tensor,
        mask: Tensor | None = None,
        distances: Tensor | None = None,
        visual: Tensor | None = None,
    ) -> list[Verdict]:
        """One verdict an image from its semantic codes (B, S) int64, S >= 1.

        `mask` (B, S) bool: which of them are an image's own, where some have fewer than others;
        None: all. What stands outside of it plays no part. `distances` (B, S) floating: how far
        each token is from its codeword; `visual` (B,) floating: how far the image's visual tokens
        are from theirs in the patch codebook (`VQGuard.visual_distances`). Without that of them by
        which the map calls images unfamiliar (`judging.unfamiliar.by`) none is.

        A verdict names the category whose threshold was exceeded and the token that decided, the
        first of several; which one where there are more, `vqguard.judging.cell_table` says.

        Raises:
            InputError: for other codes or distances, an image without a token, and a score that is
                NaN.
        """
        codes, mask, distances = require_codes(codes, mask, distances, cells=self.cells)
        visual = None if visual is None else require_visual(visual, len(codes))
        return self._table.judge(codes, mask, Distant(distances, visual), self.version)

    def category_scores(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, C) float64, 0 to 1: the image's score by each category; 1 where a cell is forbidden.

        Arguments as `judge`. With one tau for all, a verdict compares the rule's score of all
        categories together instead (`Verdict.probability`).
        """
        codes, mask, _ = require_codes(codes, mask, cells=self.cells)
        return self._table.category_images(codes, mask).clamp_max(1.0)

    def roc(
        self, codes: Tensor, labels: Sequence[str], mask: Tensor | None = None
    ) -> list[tuple[float, float, float]]:
        """(tau, false-positive rate, true-positive rate) for every tau that changes an answer.

        `codes` (n,) or (n, S) int64 with one label each, "neutral" or a category (of any name);
        `mask` as in `judge`. An image counts as found if it is flagged, in whatever category.
        Ascending in tau.

        Raises:
            InputError: unless there are both neutral and toxic images.
        """
        if len(labels) != len(codes):
            raise InputError(f"{codes.shape[0]} images but {len(labels)} labels")
        neutral = torch.tensor([label == NEUTRAL for label in labels], dtype=torch.bool)
        return roc_curve(self._image_scores(as_tokens(codes), mask), neutral)

    def _image_scores(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Image scores, float64 (n,) on the CPU; infinite where tau plays no part."""
        codes, mask, _ = require_codes(codes, mask, cells=self.cells)
        return self._table.image_scores(codes, mask)

    def with_rule(self, **changes: Any) -> SafetyMap:
        """A map of the same counts with another `tau`, `rule`, `prior` or `empty`.

        The measured false positives belong to the old rule and are dropped.
        """
        unknown = sorted(set(changes) - set(_RULE))
        if unknown:
            raise InputError(f"not a part of the rule: {unknown}; use tau, rule, prior or empty")
        return dataclasses.replace(self, **changes, false_positives=None)

    def with_judging(self, **changes: Any) -> SafetyMap:
        """A map of the same counts with other fields of `judging`.

        The measured false positives are dropped where they belong to the old settings.

        Raises:
            ConfigError: for values that do not fit their fields.
            InputError: for names of categories and cells that are not there.
        """
        judging = dataclasses.replace(self.judging, **changes)
        kept = all(getattr(judging, part) == getattr(self.judging, part) for part in _MEASURED)
        measured = self.false_positives if kept else None
        return dataclasses.replace(self, judging=judging, false_positives=measured)

    def with_budget(
        self,
        fpr: float,
        neutral_codes: Tensor,
        mask: Tensor | None = None,
        *,
        thresholds: Thresholds = "one",
        shares: Mapping[str, float] | None = None,
    ) -> SafetyMap:
        """A map with the most sensitive thresholds that flag a new neutral image with P <= `fpr`.

        Split conformal calibration (`vqguard.judging.conformal`): the guarantee holds for images
        that are exchangeable with `neutral_codes`, all categories together.

        `neutral_codes` (n,) or (n, S) int64: neutral images that are *not* in the counts and that
        no part of the guard was trained on; `mask` as in `judge`. `thresholds`: "one" for all
        categories, one a "category", or one a "parent": the topmost of each line. `shares`: by
        category or parent, the weights by which these share the budget; 1 where there is none.

        Raises:
            InputError: where n is too small for the budget, and where ties leave no threshold:
                every one within the budget would flag nothing at all.
        """
        codes, mask, _ = require_codes(as_tokens(neutral_codes), mask, cells=self.cells)
        groups: dict[str, list[int]] | None = None
        if thresholds != "one":
            groups = {}
            for column, category in enumerate(self.categories):
                line = lineage(category, self.judging.parents)
                groups.setdefault(line[-1 if thresholds == "parent" else 0], []).append(column)
        chosen, measured = choose_thresholds(
            self._table, codes, mask, budget=fpr, groups=groups, shares=shares or {}
        )
        tau = self.tau if groups else chosen.pop(ALL_CATEGORIES)
        judging = dataclasses.replace(self.judging, thresholds=chosen)
        return dataclasses.replace(self, tau=tau, judging=judging, false_positives=measured)

    def with_unfamiliar(
        self,
        budget: float,
        distances: Tensor,
        mask: Tensor | None = None,
        *,
        first: bool = False,
        patch_checksum: str = "",
    ) -> SafetyMap:
        """A map that calls an image unfamiliar, and at most `budget` of images like these.

        `distances` (n,) or (n, S) floating: how far the tokens of neutral and toxic images are from
        their codewords, images that the codebook was not trained on; `mask` as in `judge`. The
        furthest token counts. The same guarantee as `with_budget`, by a budget of its own.
        `patch_checksum`: that of the patch codebook, where `distances` (n,) are those of
        `VQGuard.visual_distances`; give them of neutral images, whose share the budget then is.
        `first`: an unfamiliar image is called so before it is called anything else. What is done
        stays what the strictest policy asks for.

        Raises:
            InputError: where n is too small for the budget.
        """
        distances = as_tokens(distances)
        mask = torch.ones_like(distances, dtype=torch.bool) if mask is None else mask.cpu()
        require_mask(mask, tuple(distances.shape))
        far = require_distances(distances, mask).masked_fill(~mask, -math.inf).amax(dim=1)
        chosen = dataclasses.replace(
            choose_distance(far, budget),
            by="visual" if patch_checksum else "judged",
            codebook_checksum=patch_checksum,
            first=first,
        )
        return self.with_judging(unfamiliar=chosen)

    @classmethod
    def calibrate(
        cls,
        codes: Tensor,
        labels: Labels,
        *,
        semantic_codes: int,
        mask: Tensor | None = None,
        tau: float | None = None,
        fpr: float | None = None,
        held_out: Tensor | None = None,
        seed: int = 0,
        count: CountOf = "tokens",
        thresholds: Thresholds = "one",
        shares: Mapping[str, float] | None = None,
        **rule: Any,
    ) -> SafetyMap:
        """Count `codes` by `labels` and choose the thresholds.

        `codes` (n,) int64 semantic codes of the calibration images, or (n, S): then every token
        counts under its image's label, or, with `count="images"`, an image once in each of its
        cells; `mask` as in `judge`. `labels` n names, "neutral" among them, or n lists of names.
        Give at most one of `tau` (0.6 if neither) and `fpr`. With `fpr`, tau is chosen on
        neutral images that are not counted: on `held_out` (m,) or (m, S), or, without it, on a
        seeded half of the neutral ones; `thresholds` and `shares` as in `with_budget`.
        `rule`: `rule`, `prior`, `empty`, `codebook_checksum`, `judging`, and `categories` (by
        default the labels' names, sorted).

        Raises:
            InputError: on labels that do not fit, and as `with_budget`.
        """
        if tau is not None and fpr is not None:
            raise InputError("give tau or fpr, not both: one follows from the other")
        if codes.shape[:1] != (len(labels),):
            raise InputError(f"codes of shape {tuple(codes.shape)} but {len(labels)} labels")
        names = {n for label in labels for n in ((label,) if isinstance(label, str) else label)}
        categories = tuple(rule.pop("categories", sorted(names - {NEUTRAL})))
        marks = label_columns(labels, categories)
        if NEUTRAL not in names:
            raise InputError("calibration needs neutral images too: without them all is toxic")
        codes = as_tokens(codes.cpu())
        mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.cpu()
        require_mask(mask, tuple(codes.shape))
        held_out_mask = None
        if fpr is not None and held_out is None:
            kept = held_out_half(marks[:, -1], seed)
            held_out, held_out_mask = codes[kept], mask[kept]
            counted = torch.ones(len(labels), dtype=torch.bool)
            counted[kept] = False
            codes, marks, mask = codes[counted], marks[counted], mask[counted]
        counts, toxic = count_images(codes, mask, marks, semantic_codes, count)
        if toxic is not None:
            judging = rule.get("judging", PAPER_JUDGE)
            rule["judging"] = dataclasses.replace(judging, toxic=tuple(toxic.tolist()))
        fitted = cls(categories, counts, tau=PAPER_TAU if tau is None else tau, **rule)
        if fpr is None or held_out is None:
            return fitted
        return fitted.with_budget(
            fpr, held_out, held_out_mask, thresholds=thresholds, shares=shares
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["categories"] = list(self.categories)
        values["counts"] = self.counts.tolist()
        if self.false_positives is not None:
            values["false_positives"] = self.false_positives.to_dict()
        del values["judging"]
        if self.judging != PAPER_JUDGE:  # else the map is written as ever
            values["judging"] = self.judging.to_dict()
        return {"schema": _SCHEMA, **values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SafetyMap:
        """Read what `to_dict` wrote.

        Raises:
            ArtefactError: on anything else.
        """
        if isinstance(data, Mapping) and data.get("schema", _SCHEMA) != _SCHEMA:
            raise ArtefactError(
                f"safety map of schema {data['schema']!r}, this version reads {_SCHEMA}; install"
                " the version of vqguard that wrote it, or calibrate again"
            )
        written = _Written.from_dict(data)
        if written.rule not in verdict_rules():
            raise ArtefactError(
                f"the safety map judges by the verdict rule {written.rule!r}, which is not known"
                f" here (known: {', '.join(verdict_rules())}): import the module that registers it"
                " first (on the command line: --adapter-module), or install the version of vqguard"
                " that has it"
            )
        values = {name: value for name, value in vars(written).items() if name != "schema"}
        try:
            return cls(**{**values, "counts": torch.tensor(written.counts, dtype=torch.int64)})
        except (InputError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ArtefactError(f"broken safety map: {error}; calibrate again") from error


@dataclass(frozen=True)
class _Written(StrictData):
    """What `SafetyMap.to_dict` gives; the map itself checks ranges."""

    schema: Literal[1]
    categories: tuple[str, ...]
    counts: Annotated[list[list[int]], Must("must be whole numbers")]
    tau: float
    rule: str
    prior: str
    empty: str
    codebook_checksum: str
    false_positives: FalsePositives | None
    judging: JudgeSettings = PAPER_JUDGE

    @classmethod
    def _refuse(cls, data: Any, problems: list[str]) -> NoReturn:
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or {*data, "judging"} != names:
            came = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ArtefactError(
                f"not a safety map: expected the keys {sorted(names)}, got {came}; calibrate again"
            )
        raise ArtefactError(f"broken safety map: {'; '.join(problems)}; calibrate again")
