"""Semantic code -> verdict: calibration counts, the rule, and its threshold.

The paper (arXiv 2511.16229): D[k][c] counts the calibration images of category c in semantic cell
k, P(c|k) = D[k][c] / sum_c' D[k][c'], and a cell is toxic if its most probable category is a toxic
one with P(c|k) > tau. The counts are kept as integers, so that the rule can change later without
the images.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from vqguard.errors import ArtefactError, InputError
from vqguard.intervals import wilson

NEUTRAL = "neutral"
"""Category of images that are not refused."""
UNSEEN = "unseen"
"""Category of a flagged cell that held no calibration image (`empty="flag"`)."""
_SCHEMA = 1


@dataclass(frozen=True)
class Verdict:
    """What the safety map says about one image, by its worst semantic token."""

    flagged: bool
    """Whether the image is refused."""
    category: str
    """The cell's toxic category; "neutral" if not flagged, "unseen" for a flagged empty cell."""
    probability: float
    """The number that the rule compares with tau, 0 to 1: P of the cell's most probable toxic
    category, or of all of them together under the rule "any". 0 for an empty cell."""
    semantic_code: int
    """Semantic cell that decided."""
    token: int = 0
    """Which of the image's semantic tokens decided."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FalsePositives:
    """The false-positive rate measured while tau was chosen, on neutral images held out for it.

    tau was chosen on these images, so the rate is a little optimistic.
    """

    budget: float
    """The rate asked for, 0 to 1."""
    flagged: int
    """Held-out neutral images that the map flags."""
    n: int
    """Held-out neutral images."""
    low: float
    """Lower end of the 95 % Wilson interval of flagged / n."""
    high: float
    """Upper end of it."""


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
    tau: float = 0.6
    """Threshold in [0, 1); a score must exceed it (paper: 0.6)."""
    rule: Literal["category", "any"] = "category"
    """What is compared with tau: the most probable toxic category (paper), or all toxic categories
    together. Under "category" a cell with equally many guns and knives and nothing else passes."""
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
        for name, allowed in (
            ("rule", ("category", "any")),
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
        """What the rule compares with tau: float64 (K,). 0 where neutral is the most probable."""
        toxic, neutral = self.probabilities[:, :-1], self.probabilities[:, -1]
        if self.rule == "any":
            return torch.where(toxic.amax(dim=1) > 0, 1.0 - neutral, 0.0)
        best = toxic.amax(dim=1)
        return torch.where(best >= neutral, best, 0.0)

    @cached_property
    def flagged_cells(self) -> Tensor:
        """Bool (K,): the cells whose images are refused."""
        flags = self.scores > self.tau
        if self.empty == "flag":
            flags = flags | (self.counts.sum(dim=1) == 0)
        return flags

    def category_of(self, code: int) -> str:
        """Category of a semantic cell: a toxic one, "unseen" or "neutral"."""
        self._check_codes(torch.tensor([code]))
        if not bool(self.flagged_cells[code]):
            return NEUTRAL
        if int(self.counts[code].sum()) == 0:
            return UNSEEN
        return self.categories[int(self.probabilities[code, :-1].argmax())]

    def flagged(self, codes: Tensor) -> Tensor:
        """Bool (B,), on the device of `codes`: whether any semantic code of (B, S) is flagged."""
        self._check_codes(codes, dims=(2,))
        return self.flagged_cells[codes.cpu()].any(dim=1).to(codes.device)

    def judge(self, codes: Tensor) -> list[Verdict]:
        """One verdict an image from its semantic codes (B, S) int64, S >= 1.

        The worst token decides: flagged before not flagged, then the higher score, then the first.
        """
        self._check_codes(codes, dims=(2,))
        codes = codes.cpu()
        worst = (self.flagged_cells[codes].double() * 2.0 + self.scores[codes]).argmax(dim=1)
        return [
            self._verdict(int(codes[row, token]), int(token)) for row, token in enumerate(worst)
        ]

    def _verdict(self, code: int, token: int) -> Verdict:
        best = float(self.probabilities[code, :-1].amax())
        shown = float(self.scores[code]) if self.rule == "any" else best
        flagged = bool(self.flagged_cells[code])
        return Verdict(flagged, self.category_of(code), shown, code, token)

    def roc(self, codes: Tensor, labels: Sequence[str]) -> list[tuple[float, float, float]]:
        """(tau, false-positive rate, true-positive rate) for every tau that changes an answer.

        `codes` (n,) or (n, S) int64 with one label each, "neutral" or a category (of any name). An
        image counts as found if it is flagged, in whatever category. Ascending in tau. Raises
        InputError unless there are both neutral and toxic images.
        """
        worst = self._image_scores(codes, labels)
        neutral = torch.tensor([label == NEUTRAL for label in labels], dtype=torch.bool)
        if bool(neutral.all()) or not bool(neutral.any()):
            raise InputError("an ROC needs neutral and toxic images")
        taus = sorted({0.0, *(score for score in worst.tolist() if 0.0 <= score < 1.0)})
        return [
            (
                tau,
                float((worst[neutral] > tau).double().mean()),
                float((worst[~neutral] > tau).double().mean()),
            )
            for tau in taus
        ]

    def _image_scores(self, codes: Tensor, labels: Sequence[str] | None = None) -> Tensor:
        """Score of each image's worst token, float64 (n,); infinite where tau plays no part."""
        codes = codes[:, None] if codes.dim() == 1 else codes
        self._check_codes(codes, dims=(2,))
        if labels is not None and len(labels) != codes.shape[0]:
            raise InputError(f"{codes.shape[0]} images but {len(labels)} labels")
        scores = self.scores.clone()
        if self.empty == "flag":
            scores[self.counts.sum(dim=1) == 0] = math.inf
        return scores[codes.cpu()].amax(dim=1)

    def _check_codes(self, codes: Tensor, dims: tuple[int, ...] = (1, 2)) -> None:
        if codes.dtype != torch.int64 or codes.dim() not in dims:
            raise InputError(
                f"expected int64 semantic codes of shape (images, tokens), got"
                f" {tuple(codes.shape)} {codes.dtype}"
            )
        if codes.dim() == 2 and codes.shape[1] < 1:
            raise InputError("an image without a semantic token has no verdict")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.cells:
            raise InputError(
                f"semantic codes must lie in 0..{self.cells - 1}, got {int(codes.min())} to"
                f" {int(codes.max())}; the map belongs to another codebook"
            )

    def with_rule(self, **changes: Any) -> SafetyMap:
        """A map of the same counts with another `tau`, `rule`, `prior` or `empty`.

        The measured false positives belong to the old rule and are dropped.
        """
        unknown = sorted(set(changes) - {"tau", "rule", "prior", "empty"})
        if unknown:
            raise InputError(f"not a part of the rule: {unknown}; use tau, rule, prior or empty")
        return dataclasses.replace(self, **changes, false_positives=None)

    def with_budget(self, fpr: float, neutral_codes: Tensor) -> SafetyMap:
        """A map with the most sensitive tau that flags at most `fpr` of `neutral_codes`.

        `neutral_codes` (n,) or (n, S) int64: neutral images that are *not* in the counts.
        Raises InputError where n is too small to show such a rate (n < 1 / fpr), and where ties
        leave no threshold: every tau within the budget would flag nothing at all.
        """
        if not 0.0 < fpr < 1.0:
            raise InputError(f"a false-positive budget lies between 0 and 1, got {fpr}")
        worst = self._image_scores(neutral_codes)
        n = worst.shape[0]
        allowed = math.floor(fpr * n + 1e-9)
        if allowed < 1:
            raise InputError(
                f"{n} held-out neutral images cannot show a false-positive rate of {fpr:.2%}: use"
                f" at least {math.ceil(1.0 / fpr)}, or a larger budget"
            )
        steps = sorted({0.0, *(score for score in self.scores.tolist() if score < 1.0)})
        for tau in steps:
            false = int((worst > tau).sum())
            if false <= allowed and bool((self.scores > tau).any()):
                low, high = wilson(false, n)
                found = FalsePositives(fpr, false, n, low, high)
                return dataclasses.replace(self, tau=tau, false_positives=found)
        least = int((worst >= self.scores.max()).sum())
        raise InputError(
            f"no threshold keeps false positives at {fpr:.2%}: the cells with the highest score"
            f" {float(self.scores.max()):.3f} hold {least} of {n} held-out neutral images"
            f" ({allowed} allowed). Calibrate with more images, a larger semantic codebook, or a"
            " larger budget"
        )

    @classmethod
    def calibrate(
        cls,
        codes: Tensor,
        labels: Sequence[str],
        *,
        semantic_codes: int,
        tau: float | None = None,
        fpr: float | None = None,
        held_out: Tensor | None = None,
        seed: int = 0,
        **rule: Any,
    ) -> SafetyMap:
        """Count `codes` by `labels` and choose tau.

        `codes` (n,) int64 semantic codes of the calibration images, or (n, S): then every token
        counts under its image's label. `labels` n names, "neutral" among them. Give at most one of
        `tau` (0.6 if neither) and `fpr`. With `fpr`, tau is chosen on neutral images that are not
        counted: on `held_out` (m,) or (m, S), or, without it, on a seeded half of the neutral ones.
        `rule`: `rule`, `prior`, `empty`, `codebook_checksum`, and `categories` (by default the
        labels' names, sorted). Raises InputError on labels that do not fit, and as `with_budget`.
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
        codes = codes.cpu()
        if fpr is not None and held_out is None:
            neutral = (column == columns[NEUTRAL]).nonzero().flatten()
            generator = torch.Generator().manual_seed(seed)
            shuffled = neutral[torch.randperm(len(neutral), generator=generator)]
            held_out = codes[shuffled[: len(neutral) // 2]]
            counted = torch.ones(len(labels), dtype=torch.bool)
            counted[shuffled[: len(neutral) // 2]] = False
            codes, column = codes[counted], column[counted]
        flat = codes.reshape(len(column), -1)
        if flat.dtype != torch.int64 or (flat.numel() and not int(flat.min()) >= 0):
            raise InputError("semantic codes must be int64 and not negative")
        if flat.numel() and int(flat.max()) >= semantic_codes:
            raise InputError(
                f"semantic code {int(flat.max())} does not fit a codebook of {semantic_codes}"
            )
        cell = flat * len(columns) + column[:, None]
        counts = torch.bincount(cell.flatten(), minlength=semantic_codes * len(columns))
        found = cls(
            categories,
            counts.reshape(semantic_codes, len(columns)),
            tau=0.6 if tau is None else tau,
            **rule,
        )
        return found if fpr is None or held_out is None else found.with_budget(fpr, held_out)

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
        """Read what `to_dict` wrote. Raises ArtefactError on anything else."""
        names = {"schema", *(field.name for field in dataclasses.fields(cls))}
        if not isinstance(data, Mapping) or set(data) != names:
            came = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ArtefactError(
                f"not a safety map: expected the keys {sorted(names)}, got {came}; calibrate again"
            )
        if data["schema"] != _SCHEMA:
            raise ArtefactError(
                f"safety map of schema {data['schema']!r}, this version reads {_SCHEMA}; install"
                " the version of vqguard that wrote it, or calibrate again"
            )
        values = {name: value for name, value in data.items() if name != "schema"}
        try:
            counts = values["counts"]
            if not all(type(count) is int for row in counts for count in row):
                raise TypeError("counts must be whole numbers")
            values["counts"] = torch.tensor(counts, dtype=torch.int64)
            values["categories"] = tuple(str(name) for name in values["categories"])
            values["tau"] = float(values["tau"])
            if values["false_positives"] is not None:
                values["false_positives"] = FalsePositives(**values["false_positives"])
            return cls(**values)
        except (InputError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ArtefactError(f"broken safety map: {error}; calibrate again") from error
