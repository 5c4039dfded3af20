from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqguard.errors import ArtefactError, InputError
from vqguard.intervals import clopper_pearson
from vqguard.safety_map import SafetyMap

# cells:            0        1        2       3      4 (empty)
COUNTS = torch.tensor([[8, 1, 1], [3, 3, 0], [1, 1, 8], [3, 1, 6], [0, 0, 0]])


def _map(**rule: Any) -> SafetyMap:
    return SafetyMap(("gun", "knife"), COUNTS, **rule)


def test_the_papers_rule() -> None:
    found = _map(tau=0.6)
    assert [found.category_of(code) for code in range(5)] == ["gun", *["neutral"] * 4]
    assert _map(tau=0.4).category_of(1) == "gun"  # 3 against 3: the first category is named
    assert _map(tau=0.2).category_of(3) == "neutral"  # gun 0.3 > tau, but neutral is likelier
    assert _map(tau=0.8).category_of(0) == "neutral"  # a score must exceed tau


def test_rule_any_flags_a_cell_shared_by_toxic_categories() -> None:
    assert _map(tau=0.6, rule="any").category_of(1) == "gun"
    assert _map(tau=0.6, rule="any").judge(torch.tensor([[1]]))[0].probability == 1.0


def test_a_tie_with_neutral_is_toxic() -> None:
    tied = SafetyMap(("gun",), torch.tensor([[5, 5]]), tau=0.4)
    assert tied.category_of(0) == "gun"


def test_balanced_prior_counts_every_category_alike() -> None:
    counts = torch.tensor([[5, 20], [0, 480]])
    assert SafetyMap(("gun",), counts).category_of(0) == "neutral"
    balanced = SafetyMap(("gun",), counts, prior="balanced")
    assert balanced.category_of(0) == "gun"
    assert float(balanced.probabilities[0, 0]) == pytest.approx(1.0 / (1.0 + 20 / 500))


def test_empty_cells_pass_unless_told_otherwise() -> None:
    assert not bool(_map().flagged(torch.tensor([[4]])))
    strict = _map(empty="flag")
    verdict = strict.judge(torch.tensor([[4]]))[0]
    assert (verdict.flagged, verdict.category, verdict.probability) == (True, "unseen", 0.0)


def test_an_image_has_the_verdict_of_its_worst_token() -> None:
    verdicts = _map().judge(torch.tensor([[2, 0, 0], [3, 1, 4]]))
    assert verdicts[0].to_dict() == {
        "flagged": True,
        "category": "gun",
        "probability": 0.8,
        "semantic_code": 0,
        "token": 1,
        "quantised": True,
        "reason": {
            "category": "gun",
            "score": 0.8,
            "threshold": 0.6,
            "token": 1,
            "semantic_code": 0,
            "action": "refuse",
            "map_version": _map().version,
            "region": None,
            "also": (),
        },
    }
    assert (verdicts[1].flagged, verdicts[1].category) == (False, "neutral")
    assert (verdicts[1].semantic_code, verdicts[1].token, verdicts[1].probability) == (1, 1, 0.5)
    assert _map().flagged(torch.tensor([[2, 0, 0], [3, 1, 4]])).tolist() == [True, False]


@settings(deadline=None)
@given(st.data())
def test_verdicts_agree_with_flags_and_with_single_tokens(data: st.DataObject) -> None:
    counts = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=4, max_size=4)
        )
    )
    found = SafetyMap(
        ("a", "b"),
        counts,
        tau=data.draw(st.floats(0, 0.99)),
        rule=data.draw(st.sampled_from(["category", "any"])),
        empty=data.draw(st.sampled_from(["neutral", "flag"])),
    )
    codes = torch.tensor(
        data.draw(
            st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=4)
        )
    )
    verdicts = found.judge(codes)
    assert [verdict.flagged for verdict in verdicts] == found.flagged(codes).tolist()
    for verdict, tokens in zip(verdicts, codes, strict=True):
        alone = found.judge(tokens[:, None])
        assert verdict.flagged == any(one.flagged for one in alone)
        assert int(tokens[verdict.token]) == verdict.semantic_code
        assert (verdict.category == "neutral") == (not verdict.flagged)


def test_calibrate_counts() -> None:
    codes = torch.tensor([0, 0, 1, 2, 2, 2])
    labels = ["gun", "gun", "knife", "neutral", "neutral", "gun"]
    found = SafetyMap.calibrate(codes, labels, semantic_codes=4)
    assert found.categories == ("gun", "knife")
    assert found.counts.tolist() == [[2, 0, 0], [0, 1, 0], [1, 0, 2], [0, 0, 0]]
    assert found.tau == 0.6
    named = SafetyMap.calibrate(
        codes, labels, semantic_codes=4, tau=0.5, categories=("knife", "gun", "blood")
    )
    assert named.counts[0].tolist() == [0, 2, 0, 0]
    tokens = SafetyMap.calibrate(
        torch.tensor([[0, 1], [2, 2]]), ["gun", "neutral"], semantic_codes=3
    )
    assert tokens.counts.tolist() == [[1, 0], [1, 0], [0, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["gun"]}, "but 1 labels"),
        ({"labels": ["gun", "gun"]}, "neutral images too"),
        ({"categories": ("knife",)}, "'gun'"),
        ({"semantic_codes": 1}, "does not fit a codebook of 1"),
        ({"tau": 0.5, "fpr": 0.1}, "not both"),
        ({"tau": 1.0}, r"\[0, 1\)"),
        ({"rule": "some"}, "rule must be one of"),
    ],
)
def test_calibrate_refuses_what_does_not_fit(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"labels": ["gun", "neutral"], "semantic_codes": 2, **changes}
    labels = arguments.pop("labels")
    with pytest.raises(InputError, match=message):
        SafetyMap.calibrate(torch.tensor([0, 1]), labels, **arguments)


def _graded() -> SafetyMap:
    toxic = torch.tensor([99, 90, 80, 70, 10])
    return SafetyMap(("gun",), torch.stack([toxic, 100 - toxic], dim=1))


def test_budget_takes_the_most_sensitive_tau_that_keeps_it() -> None:
    neutral = torch.tensor([4] * 195 + [3] * 2 + [2] * 2 + [1])
    found = _graded().with_budget(0.02, neutral)  # at most 4 of 200
    assert found.tau == pytest.approx(0.7)
    assert found.flagged_cells.tolist() == [True, True, True, False, False]
    measured = found.false_positives
    assert measured is not None
    assert (measured.flagged, measured.n, measured.budget) == (3, 200, 0.02)
    assert (measured.low, measured.high) == tuple(clopper_pearson(3, 200))
    assert _graded().with_budget(0.03, neutral).flagged_cells.tolist() == [True] * 4 + [False]


def test_budget_counts_images_not_tokens() -> None:
    neutral = torch.tensor([[4, 4]] * 98 + [[4, 3], [3, 3]])
    found = _graded().with_budget(0.03, neutral)
    assert found.false_positives is not None
    assert found.false_positives.flagged == 2
    # 2 of 100 do not show a rate of 2 %: a new image would be the 101st
    assert int(_graded().with_budget(0.02, neutral).flagged(neutral).sum()) == 0


def test_ties_that_leave_no_threshold_are_refused() -> None:
    tied = SafetyMap(("gun",), torch.tensor([[9, 1], [9, 1], [0, 50]]))
    neutral = torch.tensor([0] * 4 + [2] * 96)
    with pytest.raises(InputError, match=r"4 of 100 held-out neutral images have it \(0 may\)"):
        tied.with_budget(0.01, neutral)
    assert tied.with_budget(0.05, neutral).flagged_cells.tolist() == [True, True, False]


def test_too_few_images_for_the_budget_are_refused() -> None:
    with pytest.raises(InputError, match="at least 99"):
        _graded().with_budget(0.01, torch.full((98,), 4))
    assert _graded().with_budget(0.01, torch.full((99,), 4)).false_positives is not None


def test_calibrate_by_budget_holds_out_half_of_the_neutral_images() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.cat(
        [torch.randint(0, 3, (60,), generator=g), torch.randint(2, 8, (400,), generator=g)]
    )
    labels = ["gun"] * 60 + ["neutral"] * 400
    found = SafetyMap.calibrate(codes, labels, semantic_codes=8, fpr=0.05, seed=3)
    assert found.counts[:, -1].sum() == 200
    assert found.false_positives is not None
    assert found.false_positives.n == 200
    assert found.false_positives.flagged <= 10
    again = SafetyMap.calibrate(codes, labels, semantic_codes=8, fpr=0.05, seed=3)
    assert again.to_dict() == found.to_dict()
    outside = SafetyMap.calibrate(
        codes, labels, semantic_codes=8, fpr=0.05, held_out=torch.full((50,), 5)
    )
    assert outside.counts[:, -1].sum() == 400


def test_roc_is_monotone_and_agrees_with_the_flags() -> None:
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 5, (120, 2), generator=g)
    labels = ["gun"] * 40 + ["neutral"] * 80
    curve = _graded().roc(codes, labels)
    assert curve == sorted(curve)
    for tau, fpr, tpr in curve:
        flags = _graded().with_rule(tau=tau).flagged(codes).double()
        assert (float(flags[40:].mean()), float(flags[:40].mean())) == (fpr, tpr)
    for (_, fpr, tpr), (_, next_fpr, next_tpr) in itertools.pairwise(curve):
        assert next_fpr <= fpr
        assert next_tpr <= tpr
    with pytest.raises(InputError, match="neutral and toxic"):
        _graded().roc(codes, ["gun"] * 120)


def test_rules_change_without_the_images() -> None:
    measured = _graded().with_budget(0.02, torch.full((100,), 4))
    changed = measured.with_rule(tau=0.95)
    assert torch.equal(changed.counts, measured.counts)
    assert changed.false_positives is None, "the rate was measured under the old rule"
    with pytest.raises(InputError, match="counts"):
        measured.with_rule(counts=COUNTS)


def test_json_round_trip() -> None:
    found = _graded().with_budget(0.02, torch.full((100,), 4))
    again = SafetyMap.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_dict() == found.to_dict()
    assert torch.equal(again.flagged_cells, found.flagged_cells)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 9},
        {"surprise": 1},
        {"counts": [[1, 2], [3]]},
        {"counts": [[0.5, 1.0]]},
        {"counts": [[1, 2, 3]]},
        {"tau": 2.0},
        {"rule": ["category"]},
        {"false_positives": {"n": 3}},
        {"false_positives": {"budget": 0.1, "flagged": "1", "n": 9, "low": 0.0, "high": 0.2}},
        {"categories": ["neutral"]},
        {"categories": [1, 2]},
        {"tau": "0.5"},
        {"codebook_checksum": 3},
        {"false_positives": {"budget": "a", "flagged": 1, "n": 2, "low": 0.1, "high": 0.2}},
    ],
)
def test_broken_json_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ArtefactError):
        SafetyMap.from_dict({**_graded().to_dict(), **change})


def test_codes_are_checked() -> None:
    with pytest.raises(InputError, match=r"0\.\.4, got 5"):
        _map().judge(torch.tensor([[5]]))
    with pytest.raises(InputError, match="no verdict"):
        _map().flagged(torch.empty(2, 0, dtype=torch.int64))
    with pytest.raises(InputError, match="int64"):
        _map().judge(torch.tensor([0]))


def test_a_map_does_not_change_with_the_callers_tensor() -> None:
    counts = COUNTS.clone()
    found = SafetyMap(("gun", "knife"), counts)
    counts.zero_()
    assert torch.equal(found.counts, COUNTS)
