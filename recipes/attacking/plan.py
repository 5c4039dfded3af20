"""What is to be done: a suite's entries, laid out by subject, gradient, budget and seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from vqguard.errors import ConfigError
from vqguard.recipes.attacking.subjects import Subject
from vqguard.recipes.attacking.suite import Suite, SuiteEntry
from vqguard.redteam import ATTACKS, GRADIENTS, Budget, Goal, GradientMode, MeasuredAttack, Scope
from vqguard.redteam.attack_table import BENIGN, CLEAN
from vqguard.redteam.gradients import STRAIGHT_THROUGH

_CLEAN = (CLEAN, BENIGN)


@dataclass(frozen=True)
class Planned:
    """One attack at one budget, by one seed, on one subject: what a rate is measured on."""

    entry: SuiteEntry
    subject: Subject
    mode: GradientMode
    eps_255: float
    seed: int
    judge_every: int

    @property
    def budget(self) -> Budget:
        """What the attack may spend."""
        entry = self.entry
        return Budget(self.eps_255, entry.steps, entry.restarts, self.seed, self.judge_every)

    @property
    def kind(self) -> type[MeasuredAttack] | None:
        """The attack; None for a clean picture."""
        return None if self.entry.attack in _CLEAN else ATTACKS.named(self.entry.attack)

    @property
    def goal(self) -> Goal:
        """See `goal_of`."""
        return goal_of(self.entry)

    @property
    def universal(self) -> bool:
        """Whether it is one picture for many requests."""
        return self.kind is not None and self.kind.scope is Scope.UNIVERSAL

    @property
    def seeded(self) -> bool:
        """Whether another seed is another attempt, and not the same one counted twice."""
        if self.subject.defense is not None:
            return True  # it may draw itself
        return self.kind is not None and self.attack().seeded

    def attack(self, **more: Any) -> MeasuredAttack:
        """The attack with its budget and settings; `more`: fields that only the recipe can fill.

        Raises:
            ConfigError: a setting that the attack does not have.
        """
        if self.kind is None:
            raise ConfigError("the clean picture is not attacked")
        made: Any = self.kind.within(self.budget)
        known = {field.name for field in fields(made)}
        unknown = sorted(set(self.entry.settings) - known)
        if unknown:
            raise ConfigError(
                f"the attack {self.entry.attack!r} has no setting {unknown}; it has {sorted(known)}"
            )
        given = {name: value for name, value in more.items() if name in known}
        attack: MeasuredAttack = replace(made, **{**self.entry.settings, **given})
        return attack


def goal_of(entry: SuiteEntry) -> Goal:
    """What an attack wants; an answer where nobody attacks."""
    return Goal.ANSWER if entry.attack in _CLEAN else ATTACKS.named(entry.attack).goal


def planned(suite: Suite, subject: Subject) -> Iterator[Planned]:
    """All that the suite wants done on a subject, in its order."""
    for entry in suite.attacks:
        if subject.name not in entry.subjects or not _fits(entry, subject):
            continue
        seeds = entry.seeds or suite.seeds
        budgets = (255.0,) if entry.attack in _CLEAN else (entry.eps_255 or suite.eps_255)
        for mode in _modes(entry, subject):
            for eps in budgets:
                for seed in seeds:
                    plan = Planned(entry, subject, mode, float(eps), seed, suite.judge_every)
                    if seed == seeds[0] or plan.seeded:
                        yield plan


def _fits(entry: SuiteEntry, subject: Subject) -> bool:
    if entry.attack in _CLEAN:
        return True
    kind = ATTACKS.named(entry.attack)
    if kind.goal is not Goal.ANSWER and not subject.health.get("flagged_cells"):
        return False  # nothing can be refused, nor evaded: an alarm says so
    return subject.guarded or not kind.quantised


def _modes(entry: SuiteEntry, subject: Subject) -> list[GradientMode]:
    if not subject.guarded:
        return [GRADIENTS.named("plain")]
    own = () if entry.attack in _CLEAN else ATTACKS.named(entry.attack).gradients
    return [GRADIENTS.named(name) for name in entry.gradients or own or (STRAIGHT_THROUGH.name,)]
