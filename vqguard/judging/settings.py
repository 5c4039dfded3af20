"""The part of a safety map that the paper does not have: how it is saved and read.

`guard.json` holds it as `judging` inside the map, where it differs from the defaults; a map without
it is written as ever and read by every version.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from vqguard.errors import InputError
from vqguard.judging.policies import (
    REFUSE,
    REPORT,
    UNFAMILIAR,
    UNSEEN,
    Policy,
    lineage,
    parents_of,
    require_known,
    severity,
)
from vqguard.judging.verdict import Verdict
from vqguard.strict import StrictData, raise_problems

_SUM = 1e-6  # shares that were written as decimals


@dataclass(frozen=True)
class CellRule(StrictData):
    """A cell whose verdict is set by hand."""

    cell: int
    """Its semantic code."""
    verdict: Literal["forbid", "allow"]
    reason: str
    """Why; shown by `vqguard map show`."""
    category: str = ""
    """What a forbidden cell is called; empty for an allowed one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if not self.reason.strip():
            problems.append("reason: expected a sentence, got an empty text")
        if (self.verdict == "forbid") != bool(self.category):
            problems.append("category: give one where a cell is forbidden, and none otherwise")
        raise_problems(type(self), problems)


UnfamiliarBy: TypeAlias = Literal["judged", "visual"]
"""What makes an image unfamiliar: a judged token far from every codeword of the judge, or visual
tokens that are far from theirs in the patch codebook."""


@dataclass(frozen=True)
class Unfamiliar(StrictData):
    """From which distance on an image is far from what is known, and how that was chosen."""

    distance: float
    """Distance to codewords above which an image is unfamiliar, Euclidean: of its furthest judged
    token, or `VQGuard.visual_distances`, as `by` says."""
    budget: float
    """The share of calibration-like images that may be unfamiliar: of neutral and toxic ones
    together, of neutral ones where `by` is "visual"."""
    flagged: int
    """Calibration images above the distance."""
    n: int
    """Calibration images."""
    low: float
    """Lower end of a 95 % interval of the share among new images."""
    high: float
    """Upper end of it."""
    by: UnfamiliarBy = "judged"
    codebook_checksum: str = ""
    """`VQGuard.checksum("patch")` of the codebook whose distances these are, where `by` is
    "visual"; a guard refuses a map without it."""
    first: bool = False
    """Whether being unfamiliar names the verdict before any category. What is done stays what the
    strictest policy of all thresholds exceeded asks for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.distance < 0.0:
            problems.append(f"distance: expected >= 0, got {self.distance}")
        if (self.by == "visual") != bool(self.codebook_checksum):
            problems.append("codebook_checksum: name the patch codebook where by is 'visual'")
        raise_problems(type(self), problems)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; without those that are the default, as older versions wrote it."""
        values = super().to_dict()
        added = {"by": "judged", "codebook_checksum": "", "first": False}
        return {k: v for k, v in values.items() if k not in added or v != added[k]}


@dataclass(frozen=True)
class TextEvidence(StrictData):
    """What prompts say of each cell, as if it were images."""

    prompts: Mapping[str, tuple[str, ...]]
    """The prompts of each category and of neutral."""
    strength: float
    """How many images the prompts stand for in each cell."""
    counts: tuple[tuple[float, ...], ...]
    """(K, C + 1) pseudo-counts, the last column neutral; rows add up to `strength`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.strength <= 0.0:
            problems.append(f"strength: expected a positive number, got {self.strength}")
        if any(count < 0.0 for row in self.counts for count in row):
            problems.append("counts: expected no negative numbers")
        raise_problems(type(self), problems)


@dataclass(frozen=True)
class JudgeSettings(StrictData):
    """Evidence, thresholds and policies beyond the paper's. The defaults are the paper's rule."""

    smoothing: float = 0.0
    """Images of a Dirichlet prior that each cell begins with; 0: a code seen once is certain."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """By category or parent. A category without one has its nearest ancestor's, else tau; empty:
    one tau for all."""
    hierarchy: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parent -> children; these inherit its threshold and its policy."""
    policies: Mapping[str, Policy] = field(default_factory=dict)
    """By category, parent, "unseen" or "unfamiliar". A category without one has its nearest
    ancestor's, else it is refused; "unfamiliar" is reported."""
    language: str = ""
    """Language of the refusals; empty: the guard's own text."""
    cells: tuple[CellRule, ...] = ()
    """Cells whose verdict is set by hand."""
    unfamiliar: Unfamiliar | None = None
    """None: no image is unfamiliar."""
    toxic: tuple[int, ...] | None = None
    """(K,) toxic images a cell, each once, where some have several categories."""
    text: TextEvidence | None = None
    learned: tuple[tuple[float, ...], ...] | None = None
    """(K, C + 1) prior mean of each cell, rows that add up to 1: what a regional judge has learnt
    about its codewords. Smoothing then counts as so many images of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.smoothing < 0.0:
            problems.append(f"smoothing: expected >= 0 images, got {self.smoothing}")
        problems += [
            f"thresholds[{name!r}]: expected a number in [0, 1), got {threshold}"
            for name, threshold in self.thresholds.items()
            if not 0.0 <= threshold < 1.0
        ]
        if self.learned is not None and any(
            min(row) < 0.0 or abs(math.fsum(row) - 1.0) > _SUM for row in self.learned
        ):
            problems.append("learned: expected shares that add up to 1 in each row")
        if not self.language and any(policy.refusal for policy in self.policies.values()):
            problems.append("language: say in which of their languages refusals are given")
        numbers = [rule.cell for rule in self.cells]
        problems += [
            f"cells: cell {cell} has two rules; keep one"
            for cell in sorted({cell for cell in numbers if numbers.count(cell) > 1})
        ]
        raise_problems(type(self), problems)
        try:
            parents_of(self.hierarchy)
        except InputError as error:
            raise_problems(type(self), [f"hierarchy: {error}"])

    @property
    def parents(self) -> dict[str, str]:
        """Child -> parent."""
        return parents_of(self.hierarchy)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        known = self.unfamiliar
        return super().to_dict() | {"unfamiliar": None if known is None else known.to_dict()}

    @property
    def by_visual(self) -> bool:
        """Whether images are unfamiliar by the distance of their visual tokens."""
        return self.unfamiliar is not None and self.unfamiliar.by == "visual"

    def policy(self, category: str) -> Policy:
        """The policy of a category: its own, its nearest ancestor's, or the default."""
        for name in lineage(category, self.parents):
            if name in self.policies:
                return self.policies[name]
        return REPORT if category == UNFAMILIAR else REFUSE

    def acting(self, verdict: Verdict) -> str:
        """The category whose policy acts: of those exceeded the first of the strictest."""
        also = () if verdict.reason is None else verdict.reason.also
        return max((verdict.category, *also), key=lambda name: severity(self.policy(name).action))

    def threshold(self, category: str, tau: float) -> float:
        """The threshold of a category: its own, its nearest ancestor's, or tau."""
        for name in lineage(category, self.parents):
            if name in self.thresholds:
                return self.thresholds[name]
        return tau

    def require_fit(self, categories: Sequence[str], cells: int) -> None:
        """Raise InputError unless all that is named here is there."""
        parents = self.parents
        ancestors = {name for category in categories for name in lineage(category, parents)}
        require_known(parents, ancestors, "a place in the hierarchy")
        require_known(self.thresholds, ancestors, "a threshold")
        require_known(self.policies, {*ancestors, UNSEEN, UNFAMILIAR}, "a policy")
        for rule in self.cells:
            if not 0 <= rule.cell < cells:
                raise InputError(f"cell {rule.cell} has a rule, but the cells are 0 to {cells - 1}")
            known = [*categories, ""]
            require_known([rule.category], known, f"a rule of cell {rule.cell}")
        if self.toxic is not None and (len(self.toxic) != cells or min(self.toxic) < 0):
            raise InputError(f"toxic: expected {cells} counts of images, got {len(self.toxic)}")
        wanted = (cells, len(categories) + 1)
        for what, rows in (
            ("evidence of text", None if self.text is None else self.text.counts),
            ("learned", self.learned),
        ):
            if rows is not None and (len(rows), {len(row) for row in rows}) != (
                cells,
                {wanted[1]},
            ):
                raise InputError(f"{what}: expected numbers of shape {wanted}")


PAPER_JUDGE = JudgeSettings()
