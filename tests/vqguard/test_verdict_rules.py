"""The rule that turns counts into verdicts: masks, properties, and a rule from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqguard import (
    GuardConfig,
    SafetyMap,
    VerdictRule,
    VQGuard,
    register_verdict_rule,
    verdict_rules,
)
from vqguard.errors import ArtefactError, ConfigError, InputError
from vqguard.verdict_rules import CountedCells, score_images, verdict_rule

# cells:            0        1        2       3      4 (empty)
COUNTS = torch.tensor([[8, 1, 1], [3, 3, 0], [1, 1, 8], [3, 1, 6], [0, 0, 0]])


class MeanOfTokens(VerdictRule):
    """An image is as bad as its tokens are on average: repeated tokens would change it."""

    def cell_scores(self, cells: CountedCells) -> Tensor:
        return cells.probabilities[:, :-1].sum(dim=1)

    def image_score(self, scores: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, scores, 0.0).sum(dim=1) / mask.sum(dim=1)


class IgnoresTheMask(MeanOfTokens):
    """Reads padding as if it were an image's own."""

    def image_score(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores.mean(dim=1)


@pytest.fixture(autouse=True)
def _known_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict_rules, "_RULES", dict(verdict_rules._RULES))
    register_verdict_rule("mean", MeanOfTokens())


RULES = ("category", "any", "mean")


def _map(rule: str, **more: Any) -> SafetyMap:
    return SafetyMap(("gun", "knife"), COUNTS, rule=rule, **more)


@st.composite
def images(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Codes (B, S) and a mask that leaves every image at least one token, anywhere in its row."""
    width = draw(st.integers(1, 4))
    rows = draw(st.integers(1, 4))
    codes = st.lists(st.integers(0, 4), min_size=width, max_size=width)
    own = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    return (
        torch.tensor([draw(codes) for _ in range(rows)]),
        torch.tensor([draw(own) for _ in range(rows)]),
    )


@settings(deadline=None)
@given(images(), st.sampled_from(RULES), st.sampled_from([0.0, -1.0, 7.0, float("nan")]))
def test_a_score_never_depends_on_padding(
    batch: tuple[Tensor, Tensor], rule: str, filling: float
) -> None:
    codes, mask = batch
    scores = _map(rule).scores[codes]
    found = verdict_rule(rule).image_score(scores, mask)
    other = verdict_rule(rule).image_score(scores.masked_fill(~mask, filling), mask)
    assert torch.equal(found, other)
    assert torch.equal(score_images(verdict_rule(rule), scores, mask), found)


@settings(deadline=None)
@given(images(), st.sampled_from(RULES), st.sampled_from(["neutral", "flag"]), st.floats(0, 0.99))
def test_an_image_is_judged_alike_alone_in_a_batch_and_padded(
    batch: tuple[Tensor, Tensor], rule: str, empty: str, tau: float
) -> None:
    codes, mask = batch
    found = _map(rule, empty=empty, tau=tau)
    together = found.judge(codes.masked_fill(~mask, -1), mask)
    assert [v.flagged for v in together] == found.flagged(codes, mask).tolist()
    for verdict, row, own in zip(together, codes, mask, strict=True):
        alone = row[own][None]
        assert found.judge(alone) == [verdict]
        assert verdict.codes == tuple(alone[0].tolist())
        assert verdict.scores == tuple(found.scores[alone[0]].tolist())
        assert verdict.codes[verdict.token] == verdict.semantic_code
        assert (verdict.category == "neutral") == (not verdict.flagged)
        wider = torch.cat([torch.full((1, 2), 3), alone, torch.full((1, 1), 0)], dim=1)
        there = torch.tensor([[False, False, *[True] * alone.shape[1], False]])
        assert found.judge(wider, there) == [verdict]


@settings(deadline=None)
@given(images(), st.sampled_from(["category", "any"]))
def test_the_built_in_rules_take_the_worst_token(batch: tuple[Tensor, Tensor], rule: str) -> None:
    codes, mask = batch
    scores = _map(rule).scores[codes]
    worst = [float(row[own].max()) for row, own in zip(scores, mask, strict=True)]
    assert verdict_rule(rule).image_score(scores, mask).tolist() == worst


@pytest.mark.parametrize("rule", ["category", "any"])
def test_rules_fail_closed(rule: str) -> None:
    scores = torch.tensor([[0.2, 0.9], [0.1, 0.3]])
    judge = verdict_rule(rule).image_score
    with pytest.raises(InputError, match=r"no verdict: images \[1\]"):
        judge(scores, torch.tensor([[True, True], [False, False]]))
    with pytest.raises(InputError, match="NaN"):
        judge(torch.tensor([[0.2, float("nan")]]), torch.tensor([[True, True]]))
    with pytest.raises(InputError, match="bool"):
        judge(scores, torch.ones(2, 2))
    with pytest.raises(InputError, match=r"bool \(2, 2\)"):
        judge(scores, torch.ones(2, 1, dtype=torch.bool))


def test_maps_fail_closed() -> None:
    found, codes = _map("any"), torch.tensor([[0, 2]])
    with pytest.raises(InputError, match="no verdict"):
        found.judge(codes, torch.zeros(1, 2, dtype=torch.bool))
    with pytest.raises(InputError, match=r"0\.\.4, got -1"):
        found.flagged(torch.tensor([[0, -1]]))
    with pytest.raises(InputError, match="no verdict"):
        SafetyMap.calibrate(
            torch.tensor([[0], [1]]),
            ["gun", "neutral"],
            semantic_codes=2,
            mask=torch.tensor([[True], [False]]),
        )


def test_a_rule_that_reads_padding_is_refused() -> None:
    register_verdict_rule("careless", IgnoresTheMask())
    found, codes = _map("careless"), torch.tensor([[0, 2]])
    found.judge(codes)
    with pytest.raises(InputError, match="outside the mask"):
        found.judge(codes, torch.tensor([[True, False]]))


@pytest.mark.parametrize("scores", [[0.5] * 4, [0.5, 0.5, 0.5, 0.5, 1.5], [float("nan")] * 5])
def test_scores_of_a_rule_are_checked(scores: list[float]) -> None:
    class Wrong(MeanOfTokens):
        def cell_scores(self, cells: CountedCells) -> Tensor:
            return torch.tensor(scores)

    register_verdict_rule("wrong", Wrong())
    with pytest.raises(InputError, match=r"Wrong\.cell_scores"):
        _map("wrong").flagged(torch.tensor([[0]]))


def test_names_are_given_once() -> None:
    register_verdict_rule("mean", MeanOfTokens())
    with pytest.raises(ConfigError, match="MostProbableCategory already"):
        register_verdict_rule("category", MeanOfTokens())
    with pytest.raises(ConfigError, match="VerdictRule object"):
        register_verdict_rule("new", MeanOfTokens)  # type: ignore[arg-type]


def test_calibration_counts_no_padding() -> None:
    codes, labels = torch.tensor([[0, 1], [2, 2]]), ["gun", "neutral"]
    mask = torch.tensor([[True, True], [True, False]])
    counted = SafetyMap.calibrate(codes, labels, semantic_codes=3, mask=mask)
    assert counted.counts.tolist() == [[1, 0], [1, 0], [0, 1]]


def test_a_budget_is_kept_by_any_rule() -> None:
    g = torch.Generator().manual_seed(2)
    codes = torch.cat(
        [torch.randint(0, 2, (80, 3), generator=g), torch.randint(1, 40, (400, 3), generator=g)]
    )
    mask = torch.rand(codes.shape, generator=g) < 0.6
    mask[:, 0] = True
    labels = ["gun"] * 80 + ["neutral"] * 400
    for rule in RULES:
        found = SafetyMap.calibrate(
            codes, labels, semantic_codes=40, fpr=0.1, mask=mask, rule=rule, seed=1
        )
        assert found.false_positives is not None
        assert found.false_positives.flagged <= 20
        curve = found.roc(codes, labels, mask)
        flags = found.flagged(codes, mask)[80:].double()
        assert float(flags.mean()) == next(fpr for tau, fpr, _ in curve if tau == found.tau)


def _guard() -> VQGuard:
    return VQGuard(GuardConfig(4, 4, patch_codes=6, semantic_codes=5)).eval()


def test_a_rule_from_outside_judges_calibrates_and_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard = _guard()
    words = guard.semantic.lookup(torch.arange(5))
    codes = torch.tensor([[0, 1, 0], [1, 0, 0], [2, 2, 3], [3, 2, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 0]]).bool()
    guard.safety_map = SafetyMap.calibrate(
        guard.encode_semantic(words[codes], mask),
        ["gun", "gun", "neutral", "neutral"],
        semantic_codes=5,
        tau=0.6,
        mask=mask,
        rule="mean",
        codebook_checksum=guard.checksum("semantic"),
    )
    guard.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "guard.json").read_text())["safety_map"]["rule"] == "mean"
    again = VQGuard.from_pretrained(tmp_path)
    half_and_half = words[torch.tensor([[0, 2, 2], [0, 1, 4], [0, 0, 2]])]
    own = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    verdicts = again.judge(half_and_half, own)
    assert [round(v.probability, 3) for v in verdicts] == [0.5, 1.0, 0.667]
    assert [v.flagged for v in verdicts] == [False, True, True]
    assert [v.flagged for v in verdicts] == guard(
        words[:3, None], half_and_half, (), own
    ).flagged.tolist()
    monkeypatch.delitem(verdict_rules._RULES, "mean")
    with pytest.raises(ArtefactError, match=r"rule 'mean', which is not known here.*registers"):
        VQGuard.from_pretrained(tmp_path)


def test_padding_is_not_learnt_from() -> None:
    guard, plain = _guard().train(), _guard().train()
    tokens = torch.randn(2, 3, 4)
    semantic = torch.randn(2, 2, 4, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    out = guard(tokens, semantic, semantic_mask=mask)
    # the same tokens, each of an image of its own
    flat = plain(torch.cat([tokens, tokens[:1]]), semantic[mask][:, None])
    assert torch.equal(out.losses.vq_semantic, flat.losses.vq_semantic)
    assert int(guard.semantic.codebook.counts.sum()) == 3
    assert torch.equal(out.semantic_codes[mask], flat.semantic_codes[:, 0])
    assert torch.equal(out.semantic_tokens[mask], flat.semantic_tokens[:, 0])
    assert out.semantic_codes[~mask].tolist() == [-1]
    assert torch.equal(out.semantic_mask, mask)
    (gradient,) = torch.autograd.grad(out.losses.vq_semantic, semantic)
    assert torch.equal(gradient[~mask], torch.zeros(1, 4))
    assert bool(gradient[mask].any())


def test_masks_of_features_are_checked() -> None:
    guard, tokens, semantic = _guard(), torch.randn(2, 3, 4), torch.randn(2, 2, 4)
    whole = guard(tokens, semantic, semantic_mask=torch.ones(2, 2).bool())
    assert whole.semantic_mask is None
    assert torch.equal(whole.semantic_codes, guard(tokens, semantic).semantic_codes)
    for mask in (
        torch.ones(2, 2),
        torch.ones(2, 1).bool(),
        torch.tensor([[True] * 2, [False] * 2]),
    ):
        with pytest.raises(InputError):
            guard(tokens, semantic, semantic_mask=mask)
        with pytest.raises(InputError):
            guard.encode_semantic(semantic, mask)
