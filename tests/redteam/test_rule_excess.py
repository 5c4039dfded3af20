"""The verdict's own score as an attacker goes down on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqguard import verdict_rules
from vqguard.judging.settings import CellRule
from vqguard.redteam.verdict import rule_excess
from vqguard.safety_map import SafetyMap
from vqguard.verdict_rules import VerdictRule, register_verdict_rule

WORDS = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
COUNTS = torch.tensor([[0, 9], [5, 5], [9, 0], [9, 1]])  # toxic, neutral: scores 0, 0.5, 1, 0.9


class MeanOfTokens(VerdictRule):
    """Pools: no token decides alone."""

    def cell_scores(self, cells: verdict_rules.CountedCells) -> Tensor:
        return cells.probabilities[:, 0]

    def image_score(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, scores, 0.0).sum(dim=1) / mask.sum(dim=1)


@pytest.fixture
def mean_rule(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(verdict_rules, "_RULES", dict(verdict_rules._RULES))
    register_verdict_rule("mean of tokens", MeanOfTokens())
    return "mean of tokens"


def codes(features: Tensor) -> Tensor:
    return (features - WORDS.T).abs().argmin(dim=-1)


@pytest.mark.parametrize("rule", ["category", "any", "mean of tokens"])
def test_it_is_zero_exactly_where_the_map_lets_pass_by_the_margin(
    rule: str, mean_rule: str
) -> None:
    safety_map = SafetyMap(("gun",), COUNTS, tau=0.61, rule=rule, prior="counts")
    features = 3.0 * torch.rand(40, 3, 1, generator=torch.Generator().manual_seed(0))
    excess = rule_excess(features, WORDS, safety_map, margin=1e-6)
    flagged = safety_map.flagged(codes(features))
    assert flagged.any()
    assert not flagged.all()
    assert (excess > 0).tolist() == flagged.tolist()


def test_every_token_of_a_pooled_score_has_a_gradient(mean_rule: str) -> None:
    safety_map = SafetyMap(("gun",), COUNTS, tau=0.6, rule=mean_rule, prior="counts")
    features = torch.tensor([[[1.6], [2.4], [1.7]]], requires_grad=True)
    (slope,) = torch.autograd.grad(rule_excess(features, WORDS, safety_map).sum(), features)
    assert (slope != 0).all()
    lower = features.detach() - 0.2 * slope.sign()
    assert safety_map.rule == mean_rule
    assert lower[0, 0] < 1.6  # towards the cells that score less


def test_padding_plays_no_part() -> None:
    safety_map = SafetyMap(("gun",), COUNTS, tau=0.6, prior="counts")
    features = torch.tensor([[[0.0], [2.0]]])
    mask = torch.tensor([[True, False]])
    assert rule_excess(features, WORDS, safety_map, mask=mask).tolist() == [0.0]
    assert rule_excess(features, WORDS, safety_map).tolist() != [0.0]


def test_cells_set_by_hand_count_as_the_map_says() -> None:
    safety_map = SafetyMap(("gun",), COUNTS, tau=0.6, prior="counts").with_judging(
        cells=(CellRule(0, "forbid", "a test", "gun"), CellRule(2, "allow", "a test"))
    )
    excess = rule_excess(WORDS[:, None, :], WORDS, safety_map, margin=1e-6)
    assert (excess > 0).tolist() == safety_map.flagged(torch.arange(4)[:, None]).tolist()
