"""What a safety map adds to the paper's rule: evidence, thresholds a category, policies."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqguard.errors import ArtefactError, InputError
from vqguard.judging.policies import Policy
from vqguard.judging.settings import CellRule, JudgeSettings
from vqguard.safety_map import SafetyMap

# cells:                 0           1          2          3         4 (empty)
COUNTS = torch.tensor([[8, 1, 1], [3, 5, 0], [1, 1, 8], [1, 0, 0], [0, 0, 0]])


def make_map(judging: dict[str, Any] | None = None, **rule: Any) -> SafetyMap:
    return SafetyMap(("gun", "knife"), COUNTS, judging=JudgeSettings(**(judging or {})), **rule)


def judged(safety_map: SafetyMap, *tokens: int) -> tuple[str, str, bool]:
    verdict = safety_map.judge(torch.tensor([tokens]))[0]
    assert verdict.flagged == bool(safety_map.flagged(torch.tensor([tokens]))[0])
    return verdict.category, verdict.action, verdict.flagged


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_flags_are_those_of_the_verdicts(data: st.DataObject) -> None:
    """Whatever the thresholds, policies and hand-set cells, with and without distances."""
    draw = data.draw
    actions = st.sampled_from([Policy("report"), Policy("blank"), Policy(), Policy("raise")])
    names = st.sampled_from(["gun", "knife", "unseen", "unfamiliar"])
    policies = draw(st.dictionaries(names, actions))
    forbidden = draw(st.booleans())
    made = make_map(
        {
            "thresholds": draw(
                st.dictionaries(st.sampled_from(["gun", "knife"]), st.floats(0, 0.99))
            ),
            "policies": policies,
            "cells": (CellRule(2, "forbid", "why", "knife"),) if forbidden else (),
        },
        tau=draw(st.floats(0, 0.99)),
        rule=draw(st.sampled_from(["category", "any"])),
        empty=draw(st.sampled_from(["neutral", "flag"])),
    ).with_unfamiliar(0.2, torch.arange(1.0, 10.0))
    codes = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1))
    )
    apart = draw(
        st.lists(
            st.lists(st.floats(0, 20), min_size=2, max_size=2),
            min_size=len(codes),
            max_size=len(codes),
        )
    )
    mask = torch.tensor([[True, draw(st.booleans())] for _ in codes])
    for distances in (None, torch.tensor(apart, dtype=torch.float64)):
        verdicts = made.judge(codes, mask, distances)
        assert [v.flagged for v in verdicts] == made.flagged(codes, mask, distances).tolist()
        for verdict in verdicts:
            assert (verdict.category == "neutral") == (verdict.reason is None)
            assert verdict.flagged == (verdict.action not in ("none", "report"))


def test_a_code_seen_once_is_not_certain() -> None:
    assert float(make_map().probabilities[3, 0]) == 1.0
    smoothed = make_map({"smoothing": 4.0})
    # (1 + 4 * 13/29) / (1 + 4): 13 of all 29 images are guns
    assert float(smoothed.probabilities[3, 0]) == pytest.approx((1 + 4 * 13 / 29) / 5)
    balanced = make_map({"smoothing": 4.0}, prior="balanced")
    assert float(balanced.probabilities[3, 0]) == pytest.approx((1 + 4 * 0.25) / 5)
    assert float(balanced.probabilities[3, 2]) == pytest.approx(4 * 0.5 / 5)
    assert smoothed.probabilities[4].tolist() == [0.0, 0.0, 0.0], "nothing is known of it"


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=2, max_size=6),
    smoothing=st.floats(0.0, 50.0),
    prior=st.sampled_from(["counts", "balanced"]),
)
def test_probabilities_of_a_cell_with_images_add_up(
    rows: list[list[int]], smoothing: float, prior: Any
) -> None:
    safety_map = SafetyMap(
        ("gun", "knife"),
        torch.tensor(rows),
        prior=prior,
        judging=JudgeSettings(smoothing=smoothing),
    )
    total = safety_map.probabilities.sum(dim=1)
    for row, share in zip(rows, total.tolist(), strict=True):
        assert share == pytest.approx(1.0 if any(row) else 0.0)
    plain = SafetyMap(("gun", "knife"), torch.tensor(rows), prior=prior)
    # the more images a cell has, the less the prior moves it
    moved = (safety_map.probabilities - plain.probabilities).abs().amax(dim=1)
    images = torch.tensor(rows).sum(dim=1)
    assert bool((moved <= smoothing / (images + smoothing).clamp_min(1e-9) + 1e-9).all())


def test_an_image_counts_once_in_each_of_its_cells() -> None:
    codes = torch.tensor([[0, 0, 0, 1], [2, 2, 2, 2]])
    arguments: dict[str, Any] = {"labels": ["gun", "neutral"], "semantic_codes": 3}
    by_token = SafetyMap.calibrate(codes, **arguments)
    by_image = SafetyMap.calibrate(codes, **arguments, count="images")
    assert by_token.counts.tolist() == [[3, 0], [1, 0], [0, 4]]
    assert by_image.counts.tolist() == [[1, 0], [1, 0], [0, 1]]


def test_an_image_of_several_categories_is_one_image() -> None:
    codes = torch.tensor([0, 0, 0, 1])
    labels = [("gun", "knife"), ("gun", "knife"), "neutral", ("neutral",)]
    made = SafetyMap.calibrate(codes, labels, semantic_codes=2, tau=0.6)
    assert made.counts[0].tolist() == [2, 2, 1]
    assert made.probabilities[0].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    assert judged(made, 0) == ("gun", "refuse", True)
    again = SafetyMap.from_dict(json.loads(json.dumps(made.to_dict())))
    assert torch.equal(again.probabilities, made.probabilities)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([("gun", "neutral"), "neutral"], "image 0 has the labels"),
        ([(), "neutral"], "image 0 has the labels"),
        ([("gun", "bomb"), "neutral"], "'bomb'"),
    ],
)
def test_labels_that_contradict_are_refused(labels: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SafetyMap.calibrate(
            torch.tensor([0, 1]), labels, semantic_codes=2, categories=("gun", "knife")
        )


def test_each_category_has_its_threshold() -> None:
    strict = make_map({"thresholds": {"knife": 0.2}}, tau=0.9)
    assert judged(strict, 0) == ("neutral", "none", False), "gun 0.8 is below, knife is unlikely"
    assert judged(strict, 1) == ("knife", "refuse", True)
    both = make_map({"thresholds": {"gun": 0.3, "knife": 0.6}})
    # of cell 1, 3/8 is a gun and 5/8 a knife: the gun exceeds its threshold by more
    verdict = both.judge(torch.tensor([[2, 1]]))[0]
    assert verdict.category == "gun"
    assert verdict.reason is not None
    assert (verdict.reason.score, verdict.reason.threshold, verdict.reason.token) == (0.375, 0.3, 1)
    assert verdict.reason.map_version == both.version


def test_a_parents_threshold_and_policy_are_inherited() -> None:
    hierarchy = {"weapon": ("gun", "knife"), "danger": ("weapon",)}
    parent = make_map({"hierarchy": hierarchy, "thresholds": {"danger": 0.85, "knife": 0.6}})
    assert parent.thresholds == {"gun": 0.85, "knife": 0.6}
    policies = {"weapon": Policy("report"), "knife": Policy("raise")}
    told = make_map({"hierarchy": hierarchy, "policies": policies})
    assert judged(told, 0) == ("gun", "report", False)
    assert judged(told, 1) == ("knife", "raise", True)


def test_the_strictest_policy_names_the_verdict() -> None:
    mild = make_map({"policies": {"gun": Policy("report")}})
    assert judged(mild, 0) == ("gun", "report", False)
    assert judged(mild, 0, 1) == ("knife", "refuse", True), "a gun beside it lets no knife through"
    assert judged(make_map(), 0, 1) == ("gun", "refuse", True), "0.8 is more above tau than 0.625"


def test_cells_are_forbidden_and_allowed_by_hand() -> None:
    by_hand = make_map(
        {"cells": (CellRule(2, "forbid", "a gun, seen", "gun"), CellRule(0, "allow", "a drill"))}
    )
    assert judged(by_hand, 2) == ("gun", "refuse", True)
    assert judged(by_hand, 0) == ("neutral", "none", False)
    assert by_hand.category_of(2) == "gun"
    assert by_hand.flagged_cells.tolist() == [False, True, True, True, False]


def test_an_image_far_from_every_codeword_is_unfamiliar() -> None:
    far = make_map().with_unfamiliar(0.2, torch.arange(1.0, 10.0))  # 9 images: the 8th is at 8
    assert far.judging.unfamiliar is not None
    assert far.judging.unfamiliar.distance == 8.0
    codes, near, distant = (
        torch.tensor([[2, 2]]),
        torch.tensor([[1.0, 8.0]]),
        torch.tensor([[9.0, 1.0]]),
    )
    assert far.judge(codes, distances=near)[0].category == "neutral"
    verdict = far.judge(codes, distances=distant)[0]
    assert (verdict.category, verdict.action, verdict.flagged) == ("unfamiliar", "report", False)
    assert verdict.reason is not None
    assert (verdict.reason.score, verdict.reason.threshold, verdict.reason.token) == (9.0, 8.0, 0)
    assert far.judge(codes)[0].category == "neutral", "without distances nothing is unfamiliar"
    padded = torch.tensor([[False, True]])
    assert far.judge(codes, padded, distant)[0].category == "neutral"
    # reporting does not let a gun through; refusing names what is not known
    assert far.judge(torch.tensor([[0, 2]]), distances=distant)[0].category == "gun"
    refusing = far.with_judging(policies={"unfamiliar": Policy()})
    assert refusing.judge(torch.tensor([[0, 2]]), distances=distant)[0].category == "unfamiliar"
    assert refusing.flagged(codes, distances=distant).tolist() == [True]
    for bad in (torch.tensor([[1.0]]), torch.tensor([[float("nan"), 1.0]]), torch.tensor([[1, 2]])):
        with pytest.raises(InputError, match="distance"):
            far.judge(codes, distances=bad)
    with pytest.raises(InputError, match="use at least 99 of them"):
        make_map().with_unfamiliar(0.01, torch.rand(20))


def test_a_budget_shared_by_categories_holds_in_total() -> None:
    g = torch.Generator().manual_seed(2)
    neutral = torch.multinomial(torch.tensor([0.01, 0.01, 0.98]), 4000, True, generator=g)
    made = SafetyMap(("gun", "knife"), torch.tensor([[9, 0, 1], [0, 9, 1], [0, 0, 100]]))
    budgeted = made.with_budget(0.05, neutral[:2000], thresholds="category")
    assert sorted(budgeted.judging.thresholds) == ["gun", "knife"]
    assert float(budgeted.flagged(neutral[2000:, None]).double().mean()) <= 0.05
    assert budgeted.false_positives is not None
    assert budgeted.false_positives.conformal
    pooled = made.with_judging(hierarchy={"weapon": ("gun", "knife")}).with_budget(
        0.05, neutral[:2000], thresholds="parent"
    )
    assert pooled.judging.thresholds == {"weapon": 0.0}
    with pytest.raises(InputError, match="use at least 199 of them"):
        made.with_budget(0.01, neutral[:150], thresholds="category")


def test_what_false_positives_depend_on_drops_them() -> None:
    made = make_map().with_budget(0.05, torch.full((100,), 2))
    assert made.with_judging(policies={"gun": Policy("raise")}).false_positives is not None
    assert made.with_judging(thresholds={"gun": 0.1}).false_positives is None
    assert made.with_judging(cells=(CellRule(2, "forbid", "why", "gun"),)).false_positives is None


def test_a_map_of_the_papers_is_written_as_ever() -> None:
    assert "judging" not in make_map().to_dict()
    full = make_map(
        {
            "smoothing": 2.0,
            "thresholds": {"weapon": 0.3},
            "hierarchy": {"weapon": ("gun", "knife")},
            "policies": {"gun": Policy("warn", warning="It shows a gun.")},
            "cells": (CellRule(1, "allow", "why"),),
            "language": "fr",
        }
    ).with_unfamiliar(0.1, torch.rand(50))
    again = SafetyMap.from_dict(json.loads(json.dumps(full.to_dict())))
    assert again.to_dict() == full.to_dict()
    assert again.version == full.version
    assert full.version != make_map().version


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": {"gum": 0.5}}, "Did you mean 'gun'"),
        ({"thresholds": {"gun": 1.0}}, r"\[0, 1\)"),
        ({"policies": {"bomb": {"action": "report"}}}, "no category here"),
        ({"policies": {"gun": {"action": "shrug"}}}, "action"),
        ({"policies": {"gun": {"action": "warn"}}}, "warning"),
        ({"hierarchy": {"a": ["gun"], "b": ["gun"]}}, "stands under"),
        ({"hierarchy": {"a": ["b"], "b": ["a"]}}, "circle"),
        ({"cells": [{"cell": 9, "verdict": "allow", "reason": "why"}]}, "cells are 0 to 4"),
        ({"cells": [{"cell": 1, "verdict": "forbid", "reason": "why"}]}, "category"),
        ({"cells": [{"cell": 1, "verdict": "allow", "reason": " "}]}, "reason"),
        ({"smoothing": -1.0}, "smoothing"),
        ({"smooth": 1.0}, "smoothing"),
        ({"toxic": [1, 2]}, "toxic"),
        ({"smoothing": True}, "float"),
    ],
)
def test_a_broken_section_is_refused(change: dict[str, Any], message: str) -> None:
    data = make_map({"smoothing": 1.0}).to_dict()
    with pytest.raises(ArtefactError, match=message):
        SafetyMap.from_dict({**data, "judging": {**data["judging"], **change}})
