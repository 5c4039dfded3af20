"""The tables of attacks and of gradient modes: open to others, closed to half-filled entries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam import (
    ATTACKS,
    GRADIENTS,
    PGD,
    Attack,
    Budget,
    GradientPath,
    ThreatModel,
    Trial,
    UniversalPGD,
    measured_modes,
    threat_models,
    threat_of_gradient,
)
from vqguard.redteam.named_table import NamedTable

BUDGET = Budget(eps_255=16, steps=3, restarts=2, seed=5, judge_every=10)


pytestmark = pytest.mark.usefixtures("open_tables")


def test_every_entry_says_in_a_sentence_what_it_is() -> None:
    for entry in [*ATTACKS, *GRADIENTS]:
        assert entry.label
        assert entry.sentence.endswith(".")
        assert entry.sentence.count(". ") == 0


def test_the_first_attacks_are_named_as_in_the_records_of_earlier_reports() -> None:
    earlier = [ATTACKS.named(name) for name in ("per_request", "universal")]
    assert earlier == [PGD, UniversalPGD]
    assert [mode.name for mode in GRADIENTS] == ["plain", "stopped", "straight_through", "softmax"]


def test_a_report_s_attacks_spend_what_they_are_given() -> None:
    for pgd in (PGD.within(BUDGET), UniversalPGD.within(BUDGET).pgd):
        spent = [pgd.eps_255, pgd.steps, pgd.restarts, pgd.seed, pgd.judge_every]
        assert spent == [16, 3, 2, 5, 10]
        assert (pgd.step_255, pgd.momentum, pgd.decay) == (2.0, 0.9, "cosine")
    assert UniversalPGD.within(BUDGET).budget == BUDGET


def test_a_base_gives_a_new_attack_its_budget_and_its_condition() -> None:
    @ATTACKS.register
    @dataclass(frozen=True, kw_only=True)
    class Still(Attack):
        name: ClassVar[str] = "still"
        label: ClassVar[str] = "Still"
        sentence: ClassVar[str] = "Does not move."

        def run(self, trial: Trial, start: Tensor) -> None:
            trial.close(start)

    assert Still in list(ATTACKS)
    assert Still.within(BUDGET) == Still(eps_255=16, steps=3, restarts=2, seed=5, judge_every=10)
    assert Still.condition(BUDGET, "plain")["attack"] == "still"
    assert Still.heading("base, plain") == "still: base, plain"


@pytest.mark.parametrize("taken", ["per_request", "none"])
def test_a_name_that_records_use_already_is_refused(taken: str) -> None:
    class Other(PGD):
        name: ClassVar[str] = taken

    with pytest.raises(ConfigError, match="taken"):
        ATTACKS.register(Other)


def test_an_attack_without_its_facts_is_refused_by_their_names() -> None:
    class Silent(Attack):
        name: ClassVar[str] = "silent"

        def run(self, trial: Trial, start: Tensor) -> None:
            trial.close(start)

    with pytest.raises(ConfigError, match="label, sentence"):
        ATTACKS.register(Silent)
    assert "silent" not in ATTACKS


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"unknown attack 'pgd'.*'per_request'.*'universal'"):
        ATTACKS.named("pgd")


def test_a_gradient_from_outside_is_a_mode_like_the_others() -> None:
    attacker = ThreatModel("adaptive_other", "Somebody else.", adaptive=True)
    mode = replace(GRADIENTS.named("straight_through"), name="other", threat_model=attacker)
    GRADIENTS.register(mode)
    assert GradientPath("other").estimator() is mode.estimator
    assert threat_of_gradient("other") is attacker
    assert threat_of_gradient(mode) is attacker
    assert mode in measured_modes(quantised=True)
    assert mode not in measured_modes(quantised=False)
    assert threat_models()[-1] is attacker


def test_an_attack_that_follows_no_gradient_of_the_victim_names_its_attacker() -> None:
    by_attacker: dict[str, set[str]] = {}
    for attack in ATTACKS:
        if attack.threat is not None:
            by_attacker.setdefault(attack.threat.value, set()).add(attack.name)
    assert by_attacker == {
        "scores": {"square", "evasion_square", "denial_square"},
        "decisions": {"query_only", "evasion_decisions", "denial_decisions"},
        "corruption": {"corruptions", "evasion_noise", "denial_noise"},
        "transfer": {"transfer", "transfer_surrogate", "universal_transfer"},
        "typographic": {"typographic_list", "typographic_caption"},
    }
    told = threat_models()
    assert all(attack.threat in told for attack in ATTACKS if attack.threat is not None)


def test_a_table_keeps_the_order_of_its_lines() -> None:
    modes = list(GRADIENTS)
    table = NamedTable("mode", *reversed(modes))
    assert list(table) == modes[::-1]
    assert table.labels == {mode.name: mode.label for mode in modes[::-1]}
