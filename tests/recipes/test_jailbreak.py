"""Which attacks are run on whom, on a model that was never trained."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from vqguard.recipes.data.samples import AttackCase
from vqguard.recipes.evaluation.jailbreak import Jailbreak, JailbreakFindings
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.recipe import AttackRecipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.records import Record
from vqguard.redteam import ATTACKS, Budget, Scope, UniversalAttack, UniversalTrial
from vqguard.redteam.attacks.pgd import PGD
from vqguard.safety_map import SafetyMap

MakeModel = Callable[..., tuple[Any, Any]]
RECIPE = AttackRecipe(
    eps_255=(16,),
    requests=2,
    steps=2,
    adaptive_steps=1,
    adaptive_restarts=1,
    universal_requests=2,
    universal_held_out=2,
    universal_steps=2,
)


def cases(count: int) -> list[AttackCase]:
    return TinyWorld(0).attack_cases(count)


def attacked(
    subject: str, made: tuple[Any, Any], given: list[AttackCase], recipe: AttackRecipe = RECIPE
) -> list[Record]:
    model, processor = made
    ledger = Ledger("a command", 0)
    Jailbreak(recipe, given, processor, 0).measure(ledger, subject, model, JailbreakFindings())
    return ledger.records


def kinds(records: list[Record]) -> list[tuple[Any, Any]]:
    return [(r.condition["attack"], r.condition["gradient"]) for r in records]


def test_a_control_is_attacked_only_by_what_controls_are_for(small_model: MakeModel) -> None:
    given = cases(Jailbreak.cases_needed(RECIPE))
    assert kinds(attacked("base", small_model(), given)) == [
        ("none", "plain"),
        ("per_request", "plain"),
        ("universal", "plain"),
    ]
    assert kinds(attacked("finetuned_control", small_model(), given)) == [
        ("none", "plain"),
        ("per_request", "plain"),
    ]


def test_no_universal_requests_leave_that_attack_out(small_model: MakeModel) -> None:
    recipe = RECIPE.override(["universal_requests=0"])
    assert ("universal", "plain") not in kinds(attacked("base", small_model(), cases(6), recipe))


def test_pieces_of_one_budget_each_measure_what_the_whole_measures(
    small_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = RECIPE.override(["eps_255=[8, 16]"])
    model, processor = small_model()
    given = cases(3)  # too few for a universal picture
    with caplog.at_level(logging.WARNING):
        pieces = Jailbreak.by_budget(recipe, given, processor, 0)
    assert len(caplog.records) == 1
    budgets = [(piece.recipe.eps_255, piece.clean) for piece in pieces]
    assert budgets == [((8,), True), ((16,), False)]
    whole = Jailbreak(recipe, given, processor, 0)
    ledgers, findings = [], []
    for jailbreaks in ([whole], pieces):
        ledgers.append(Ledger("a command", 0))
        findings.append(JailbreakFindings())
        for jailbreak in jailbreaks:
            jailbreak.measure(ledgers[-1], "base", model, findings[-1])
    assert ledgers[0].records == ledgers[1].records
    assert [r.condition["eps_255"] for r in ledgers[0].records] == [0, 8, 16]
    assert findings[0].losses == findings[1].losses
    assert list(findings[0].losses) == list(findings[1].losses)
    assert findings[0].warnings == findings[1].warnings
    for caption, picture in findings[0].adversarial.items():
        assert torch.equal(picture, findings[1].adversarial[caption])


def test_without_a_budget_clean_pictures_are_left() -> None:
    (piece,) = Jailbreak.by_budget(RECIPE.override(["eps_255=[]"]), cases(5), None, 0)
    assert (piece.recipe.eps_255, piece.clean) == ((), True)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_too_few_cases_leave_the_universal_attack_out_and_say_so(
    count: int, small_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Two attacks of one's own must not end an evaluation that follows hours of training."""
    with caplog.at_level(logging.WARNING):
        records = attacked("base", small_model(), cases(count))
    assert kinds(records) == [("none", "plain"), ("per_request", "plain")]
    assert [r.n for r in records] == [min(count, 2)] * 2
    assert f"at least 5 cases, got {count}" in caplog.text


def test_an_attack_may_ask_for_a_gradient_that_reports_do_not_measure_by(
    small_model: MakeModel, small_guarded: MakeModel, open_tables: None
) -> None:
    @ATTACKS.register
    @dataclass(frozen=True, kw_only=True)
    class Relaxed(PGD):
        name: ClassVar[str] = "relaxed"
        label: ClassVar[str] = "Relaxed"
        sentence: ClassVar[str] = "PGD through a softmax alone."
        gradients: ClassVar[tuple[str, ...]] = ("softmax",)

    guarded, processor = small_guarded()
    guard = guarded.vqguard
    counts = torch.tensor([[9, 1], *[[1, 9]] * 7])  # of eight cells, the first is toxic
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    records = attacked("guarded", (guarded, processor), cases(2))
    assert kinds(records) == [
        ("none", "stopped"),
        ("per_request", "stopped"),
        ("none", "straight_through"),
        ("per_request", "straight_through"),
        ("none", "softmax"),
        ("relaxed", "softmax"),
    ]
    assert records[-1].threat_model == "adaptive_softmax"
    assert kinds(attacked("base", small_model(), cases(2))) == [
        ("none", "plain"),
        ("per_request", "plain"),
    ]


def test_a_universal_attack_from_outside_writes_only_its_steps(
    small_model: MakeModel, open_tables: None
) -> None:
    """Checks, restarts, clipping, judging and scoring are the base's."""

    @ATTACKS.register
    @dataclass(frozen=True, kw_only=True)
    class OneStep(UniversalAttack):
        name: ClassVar[str] = "one_step"
        label: ClassVar[str] = "One step"
        sentence: ClassVar[str] = "A sign step as long as the budget, on one picture."
        spent: Budget

        @classmethod
        def within(cls, budget: Budget) -> OneStep:
            return cls(spent=budget)

        @property
        def budget(self) -> Budget:
            return self.spent

        def run(self, trial: UniversalTrial, start: torch.Tensor) -> None:
            trial.close(trial.project(start - trial.gradient(start).sign()))

    records = attacked("base", small_model(), cases(Jailbreak.cases_needed(RECIPE)))
    (record,) = (r for r in records if r.condition["attack"] == "one_step")
    assert OneStep.scope is Scope.UNIVERSAL
    assert record.n == 2
    assert record.condition["eps_255"] == 16
