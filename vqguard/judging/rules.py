"""One's own rules of a safety map: evidence, thresholds, hierarchy and policies, read from YAML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vqguard.errors import InputError
from vqguard.judging.policies import Policy, lineage
from vqguard.judging.settings import JudgeSettings, UnfamiliarBy
from vqguard.strict import StrictConfig, raise_problems


@dataclass(frozen=True)
class JudgeRules(StrictConfig):
    """What `vqguard calibrate --rules FILE` reads, and `rules` of a retrofit's recipe."""

    smoothing: float = 0.0
    """Images of a prior that each cell begins with, so that a code seen once is not certain; 0: the
    counts as they are (the paper)."""
    prior: Literal["counts", "balanced"] = "counts"
    """`balanced`: as if every category had as many images."""
    count: Literal["tokens", "images"] = "tokens"
    """Whether every token counts, or an image once in each of its cells."""
    budget: Literal["one", "category", "parent"] = "one"
    """Which thresholds a false-positive budget chooses: one for all categories, or one for each
    category or topmost parent, which share it."""
    shares: dict[str, float] = field(default_factory=dict)
    """Weights by which categories or parents share the budget; 1 where none is given."""
    unfamiliar: float | None = None
    """Share of calibration-like images that may be called unfamiliar; null: none is."""
    unfamiliar_by: UnfamiliarBy = "judged"
    """`judged`: an image is unfamiliar where a judged token is far from every codeword of the
    judge; `visual`: where its visual tokens are far from their codewords in the patch codebook,
    which a judge alone does not have. The share is then one of neutral images."""
    unfamiliar_first: bool = False
    """Whether `unfamiliar` names the verdict before any category. The strictest policy acts all the
    same, so a toxic image that looks strange is refused as before, and is not called toxic."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """Fixed thresholds, by category or parent; not together with a budget."""
    hierarchy: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Parent -> children, which inherit its threshold and policy."""
    policies: dict[str, Policy] = field(default_factory=dict)
    """What is done, by category, parent, `unseen` or `unfamiliar`."""
    language: str = ""
    """Language of the refusals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = []
        if self.shares and self.budget == "one":
            problems.append("shares: there is nothing to share with budget: one; use category")
        if self.thresholds and self.budget != "one":
            problems.append("thresholds: a budget chooses them; leave budget or thresholds out")
        if self.unfamiliar is not None and not 0.0 < self.unfamiliar < 1.0:
            problems.append(f"unfamiliar: expected a share in (0, 1), got {self.unfamiliar}")
        if self.unfamiliar is None and (self.unfamiliar_by != "judged" or self.unfamiliar_first):
            problems.append(
                "unfamiliar: give a share where unfamiliar_by or unfamiliar_first is set, for "
                "example 0.005"
            )
        raise_problems(type(self), problems)
        self.settings()

    def require_budget(self, fpr: float | None) -> None:
        """Raise InputError unless these go with a false-positive budget, or with None of it."""
        if fpr is not None and self.thresholds:
            raise InputError(
                "the rules fix thresholds, a false-positive budget chooses them: use one"
            )
        if fpr is None and self.budget != "one":
            raise InputError(
                f"the rules ask for budget: {self.budget}, but none is given: use --fpr, or fpr in"
                " a recipe"
            )

    def count_thresholds(self, categories: Sequence[str]) -> int:
        """How many thresholds share a budget."""
        if self.budget == "one":
            return 1
        parents = self.settings().parents
        end = -1 if self.budget == "parent" else 0
        return len({lineage(name, parents)[end] for name in categories})

    def settings(self) -> JudgeSettings:
        """What of this is saved in the safety map before anything is measured."""
        return JudgeSettings(
            smoothing=self.smoothing,
            thresholds=self.thresholds,
            hierarchy=self.hierarchy,
            policies=self.policies,
            language=self.language,
        )
