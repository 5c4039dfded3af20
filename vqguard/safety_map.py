"""Semantic code -> verdict: calibration counts, the rule that reads them, and its threshold.

The paper (arXiv 2511.16229): D[k][c] counts the calibration images of category c in semantic cell
k, P(c|k) = D[k][c] / sum_c' D[k][c'], and a cell is toxic if its most probable category is a toxic
one with P(c|k) > tau. The counts are kept as integers, so that the rule (`vqguard.verdict_rules`)
can change later without the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NoReturn

import torch
from torch import Tensor

from vqguard.errors import ArtefactError, InputError
from vqguard.paper import PAPER_TAU
from vqguard.strict import Must, StrictData
from vqguard.thresholds import FalsePositives, choose_tau, roc_curve
from vqguard.verdict_rules import (
    PAPER_RULE,
    require_mask,
    score_cells,
    score_images,
    verdict_rule,
    verdict_rules,
)

NEUTRAL = "neutral"
"""Category of images that are not refused."""
UNSEEN = "unseen"
"""Category of a flagged cell that held no calibration image (`empty="flag"`)."""
_SCHEMA = 1


@dataclass(frozen=True)
class Verdict:
    """What the safety map says about one image, and by which of its semantic tokens."""

    flagged: bool
    """Whether the image is refused."""
    category: str
    """The deciding cell's toxic category; "neutral" if not flagged, "unseen" for an empty cell."""
    probability: float
    """The number that is compared with tau, 0 to 1: the image's score under the map's rule. Where
    that is 0, P of the deciding cell's most probable toxic category; 0 for an empty cell."""
    semantic_code: int
    """Semantic cell that decided."""
    token: int = 0
    """Which of the image's semantic tokens decided, padding not counted."""
    codes: tuple[int, ...] = ()
    """Semantic codes of all its tokens."""
    scores: tuple[float, ...] = ()
    """What the rule gives the cell of each, 0 to 1."""

    def to_dict(self) -> dict[str, Any]:
        """The verdict without its tokens, as plain values ready for JSON."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name not in ("codes", "scores")}


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
    """How tau was chosen, where it was chosen by a false-positive budget."""

    def __post_init__(self) -> None:
        if not self.categories or len(set(self.categories)) != len(self.categories):
            raise InputError(f"expected distinct toxic categories, got {self.categories}")
        if {NEUTRAL, UNSEEN} & set(self.categories):
            raise InputError(f"{NEUTRAL!r} and {UNSEEN!r} are not toxic categories")
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
        # the map does not change when the caller's tensor does
        object.__setattr__(self, "counts", counts.detach().cpu().clone())

    @property
    def cells(self) -> int:
        """Number of semantic cells K."""
        return self.counts.shape[0]

    @cached_property
    def probabilities(self) -> Tensor:
        """P(c|k): float64 (K, C + 1), last column neutral; a row of zeros for an empty cell."""
        shares = self.counts.double()
        if self.prior == "balanced":
            shares = shares / shares.sum(dim=0).clamp_min(1.0)
        return shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    @cached_property
    def scores(self) -> Tensor:
        """What the rule gives each cell, 0 to 1: float64 (K,)."""
        return score_cells(verdict_rule(self.rule), self)

    @cached_property
    def flagged_cells(self) -> Tensor:
        """Bool (K,): the cells that are refused where an image has one token alone."""
        return self._image_scores(torch.arange(self.cells)[:, None]) > self.tau

    @cached_property
    def _unseen_cells(self) -> Tensor:
        """Bool (K,): the cells that are flagged for being empty, whatever the rule says."""
        return (self.counts.sum(dim=1) == 0) & (self.empty == "flag")

    def category_of(self, code: int) -> str:
        """Category of a semantic cell: a toxic one, "unseen" or "neutral"."""
        self._on_cpu(torch.tensor([[code]]))
        return self._category(code) if bool(self.flagged_cells[code]) else NEUTRAL

    def _category(self, code: int) -> str:
        """What a flagged cell is called."""
        if int(self.counts[code].sum()) == 0:
            return UNSEEN
        return self.categories[int(self.probabilities[code, :-1].argmax())]

    def flagged(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Bool (B,), on the device of `codes`: which images are refused. Arguments as `judge`."""
        return (self._image_scores(codes, mask) > self.tau).to(codes.device)

    def judge(self, codes: Tensor, mask: Tensor | None = None) -> list[Verdict]:
        """One verdict an image from its semantic codes (B, S) int64, S >= 1.

        `mask` (B, S) bool: which of them are an image's own, where some have fewer than others;
        None: all. What stands outside of it plays no part. The token with the highest score is
        named as the one that decided, the first of several; where the score alone would not flag
        the image, its first token in an empty cell (under `empty="flag"`).

        Raises:
            InputError: for other codes, an image without a token, and a score that is NaN.
        """
        codes, mask = self._on_cpu(codes, mask)
        scores, unseen = self.scores[codes], self._unseen_cells[codes] & mask
        images = score_images(verdict_rule(self.rule), scores, mask)
        by_score = (images > self.tau) | ~unseen.any(dim=1)
        deciding = torch.where(
            by_score, scores.masked_fill(~mask, -math.inf).argmax(dim=1), unseen.int().argmax(dim=1)
        )
        verdicts = []
        for row, token in enumerate(deciding.tolist()):
            code = int(codes[row, token])
            flagged = bool(images[row] > self.tau) or not bool(by_score[row])
            shown = float(images[row]) if bool(by_score[row]) else 0.0
            own = mask[row]
            verdicts.append(
                Verdict(
                    flagged,
                    self._category(code) if flagged else NEUTRAL,
                    shown if shown > 0 else float(self.probabilities[code, :-1].amax()),
                    code,
                    int(own[:token].sum()),
                    tuple(codes[row, own].tolist()),
                    tuple(scores[row, own].tolist()),
                )
            )
        return verdicts

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
        return roc_curve(self._image_scores(_as_tokens(codes), mask), neutral)

    def _image_scores(self, codes: Tensor, mask: Tensor | None = None) -> Tensor:
        """Image scores, float64 (n,) on the CPU; infinite where tau plays no part."""
        codes, mask = self._on_cpu(codes, mask)
        images = score_images(verdict_rule(self.rule), self.scores[codes], mask)
        return images.masked_fill((self._unseen_cells[codes] & mask).any(dim=1), math.inf)

    def _on_cpu(self, codes: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Checked codes and their mask, both (B, S) on the CPU; cell 0 stands at padding."""
        if codes.dtype != torch.int64 or codes.dim() != 2:
            raise InputError(
                f"expected int64 semantic codes of shape (images, tokens), got"
                f" {tuple(codes.shape)} {codes.dtype}"
            )
        if codes.shape[1] < 1:
            raise InputError("an image without a semantic token has no verdict")
        codes = codes.cpu()
        mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.cpu()
        require_mask(mask, tuple(codes.shape))
        codes = codes.masked_fill(~mask, 0)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.cells:
            raise InputError(
                f"semantic codes must lie in 0..{self.cells - 1}, got {int(codes.min())} to"
                f" {int(codes.max())}; the map belongs to another codebook"
            )
        return codes, mask

    def with_rule(self, **changes: Any) -> SafetyMap:
        """A map of the same counts with another `tau`, `rule`, `prior` or `empty`.

        The measured false positives belong to the old rule and are dropped.
        """
        unknown = sorted(set(changes) - {"tau", "rule", "prior", "empty"})
        if unknown:
            raise InputError(f"not a part of the rule: {unknown}; use tau, rule, prior or empty")
        return dataclasses.replace(self, **changes, false_positives=None)

    def with_budget(
        self, fpr: float, neutral_codes: Tensor, mask: Tensor | None = None
    ) -> SafetyMap:
        """A map with the most sensitive tau that flags at most `fpr` of `neutral_codes`.

        `neutral_codes` (n,) or (n, S) int64: neutral images that are *not* in the counts; `mask` as
        in `judge`.

        Raises:
            InputError: where n is too small to show such a rate (n < 1 / fpr), and where ties leave
                no threshold: every tau within the budget would flag nothing at all.
        """
        codes = _as_tokens(neutral_codes)
        neutral = self._image_scores(codes, mask)
        # what an image scores whose tokens all lie in one cell: above it nothing is flagged
        filled = self.scores[:, None].expand(-1, codes.shape[1])
        cells = score_images(verdict_rule(self.rule), filled, torch.ones_like(filled).bool())
        tau, measured = choose_tau(fpr, neutral, cells)
        return dataclasses.replace(self, tau=tau, false_positives=measured)

    @classmethod
    def calibrate(
        cls,
        codes: Tensor,
        labels: Sequence[str],
        *,
        semantic_codes: int,
        mask: Tensor | None = None,
        tau: float | None = None,
        fpr: float | None = None,
        held_out: Tensor | None = None,
        seed: int = 0,
        **rule: Any,
    ) -> SafetyMap:
        """Count `codes` by `labels` and choose tau.

        `codes` (n,) int64 semantic codes of the calibration images, or (n, S): then every token
        counts under its image's label, `mask` as in `judge`. `labels` n names, "neutral" among
        them. Give at most one of `tau` (0.6 if neither) and `fpr`. With `fpr`, tau is chosen on
        neutral images that are not counted: on `held_out` (m,) or (m, S), or, without it, on a
        seeded half of the neutral ones.
        `rule`: `rule`, `prior`, `empty`, `codebook_checksum`, and `categories` (by default the
        labels' names, sorted).

        Raises:
            InputError: on labels that do not fit, and as `with_budget`.
        """
        if tau is not None and fpr is not None:
            raise InputError("give tau or fpr, not both: one follows from the other")
        if codes.shape[:1] != (len(labels),):
            raise InputError(f"codes of shape {tuple(codes.shape)} but {len(labels)} labels")
        categories = tuple(rule.pop("categories", sorted({*labels} - {NEUTRAL})))
        columns = {name: column for column, name in enumerate((*categories, NEUTRAL))}
        unknown = sorted({*labels} - columns.keys())
        if unknown:
            raise InputError(f"labels {unknown} are not among the categories {categories}")
        if NEUTRAL not in labels:
            raise InputError("calibration needs neutral images too: without them all is toxic")
        column = torch.tensor([columns[label] for label in labels])
        codes = _as_tokens(codes.cpu())
        mask = torch.ones_like(codes, dtype=torch.bool) if mask is None else mask.cpu()
        require_mask(mask, tuple(codes.shape))
        held_out_mask = None
        if fpr is not None and held_out is None:
            neutral = (column == columns[NEUTRAL]).nonzero().flatten()
            generator = torch.Generator().manual_seed(seed)
            shuffled = neutral[torch.randperm(len(neutral), generator=generator)]
            kept = shuffled[: len(neutral) // 2]
            held_out, held_out_mask = codes[kept], mask[kept]
            counted = torch.ones(len(labels), dtype=torch.bool)
            counted[kept] = False
            codes, column, mask = codes[counted], column[counted], mask[counted]
        counted_codes, counted_columns = codes[mask], column[:, None].expand_as(codes)[mask]
        if codes.dtype != torch.int64 or not bool((counted_codes >= 0).all()):
            raise InputError("semantic codes must be int64 and not negative")
        if counted_codes.numel() and int(counted_codes.max()) >= semantic_codes:
            raise InputError(
                f"semantic code {int(counted_codes.max())} does not fit a codebook of"
                f" {semantic_codes}"
            )
        cell = counted_codes * len(columns) + counted_columns
        counts = torch.bincount(cell, minlength=semantic_codes * len(columns))
        fitted = cls(
            categories,
            counts.reshape(semantic_codes, len(columns)),
            tau=PAPER_TAU if tau is None else tau,
            **rule,
        )
        if fpr is None or held_out is None:
            return fitted
        return fitted.with_budget(fpr, held_out, held_out_mask)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["categories"] = list(self.categories)
        values["counts"] = self.counts.tolist()
        if self.false_positives is not None:
            values["false_positives"] = dataclasses.asdict(self.false_positives)
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

    @classmethod
    def _refuse(cls, data: Any, problems: list[str]) -> NoReturn:
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            came = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ArtefactError(
                f"not a safety map: expected the keys {sorted(names)}, got {came}; calibrate again"
            )
        raise ArtefactError(f"broken safety map: {'; '.join(problems)}; calibrate again")


def _as_tokens(codes: Tensor) -> Tensor:
    """(n, S) of codes (n, S), or (n,) with one token an image."""
    return codes[:, None] if codes.dim() == 1 else codes
