"""`as_classifier` and `CodeTarget`: what other tools and attackers who look inside are given."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.adapters import as_classifier
from vqguard.adapters.attack_target import GenerationTarget
from vqguard.adapters.code_target import CodeTarget, _distance, _Seen
from vqguard.adapters.runtime.smoothing import noisy_copies
from vqguard.config import SmoothingSettings
from vqguard.errors import ConfigError
from vqguard.redteam.pixels import to_8_bit
from vqguard.redteam.quantised import QuantisedTarget

from .test_target_guarded import (
    OPENINGS,
    PROMPTS,
    always,
    codes_of,
    flag,
    guarded,
    images,
    make_processor,
)

__all__ = ["guarded"]


def code_target(model: Any, **options: Any) -> CodeTarget:
    return CodeTarget(model, make_processor(), PROMPTS, OPENINGS, **options)


def test_comply_is_the_class_exactly_where_greedy_decoding_begins_with_the_opening(
    guarded: Any,
) -> None:
    """The opening is what the model says first to a picture, so that both classes occur."""
    pixels = images(6)
    first = as_classifier(guarded, make_processor(), PROMPTS[0], view="next_token")(pixels)
    said = make_processor().tokenizer.convert_ids_to_tokens(first.argmax(dim=1).tolist())
    # this tokenizer finds its special words w2 and w3 in every word that begins with them
    spoken = [word for word in said if word[0] == "w" and word[1] not in "23"]
    assert spoken
    for opening in {*spoken, "w40"}:
        view = as_classifier(guarded, make_processor(), PROMPTS[0], opening=opening)
        classes = view(pixels).argmax(dim=1).tolist()
        assert classes == [int(word == opening) for word in said]


def test_the_verdict_is_the_class_exactly_where_the_guard_flags(guarded: Any) -> None:
    pixels = images(8, seed=4)
    target = code_target(guarded)
    codes = codes_of(guarded, target, pixels)
    flag(guarded.vqguard, {codes[0]})
    view = as_classifier(guarded, make_processor(), PROMPTS[0], view="verdict")
    assert view(pixels).argmax(dim=1).bool().tolist() == target.refused(pixels).tolist()
    for chosen, expected in ((set(), 0), (set(range(6)), 1)):
        flag(guarded.vqguard, chosen)
        assert view(pixels).argmax(dim=1).tolist() == [expected] * 8


def test_next_token_is_what_the_model_says_first(guarded: Any) -> None:
    view = as_classifier(guarded, make_processor(), PROMPTS[1], view="next_token")
    target = GenerationTarget(guarded, make_processor(), PROMPTS[1:2], OPENINGS[:1], always)
    said = target.answers(images(), torch.zeros(3, dtype=torch.int64))
    words = make_processor().tokenizer.batch_decode(view(images()).argmax(dim=1)[:, None])
    assert [text.split()[0] for text in said] == words


@pytest.mark.parametrize("gradient", ["straight_through", "softmax", "plain"])
@pytest.mark.parametrize("view", ["comply", "verdict", "next_token"])
def test_every_view_has_a_gradient_at_the_pixels(view: Any, gradient: str, guarded: Any) -> None:
    pixels = images(3, seed=2)
    flag(guarded.vqguard, {codes_of(guarded, code_target(guarded), pixels)[0]})
    classifier = as_classifier(
        guarded, make_processor(), PROMPTS[0], opening="w11", view=view, gradient=gradient
    )
    leaf = pixels.requires_grad_()
    (slope,) = torch.autograd.grad(classifier(leaf).logsumexp(dim=1).sum(), leaf)
    assert slope.flatten(1).abs().amax(dim=1).gt(0).all()


def test_a_stopped_gradient_is_stopped_in_the_classifier_too(guarded: Any) -> None:
    view = as_classifier(guarded, make_processor(), PROMPTS[0], opening="w11", gradient="stopped")
    with view.target:
        assert not view(images().requires_grad_()).requires_grad


def test_views_that_a_model_cannot_have_are_refused(guarded: Any, make_llava: Any) -> None:
    with pytest.raises(ConfigError, match="opening"):
        as_classifier(guarded, make_processor(), PROMPTS[0])
    with pytest.raises(ConfigError, match="safety map"):
        as_classifier(make_llava(), make_processor(), PROMPTS[0], view="verdict")
    plain = as_classifier(make_llava(), make_processor(), PROMPTS[0], opening="w11")
    assert plain(images()).shape == (3, 2)


# -- the inside


def test_a_guarded_model_is_a_quantised_target_and_its_parts_add_up(guarded: Any) -> None:
    pixels, rows = images(3, seed=5), torch.arange(3)
    target = code_target(guarded, gradient="straight_through")
    assert isinstance(target, QuantisedTarget)
    codes = target.codes(target.features(pixels))

    def written(features: Tensor, words: Tensor, indices: Tensor) -> Tensor:
        return words[codes.reshape(indices.shape)]

    expected = target.loss(pixels, rows)
    torch.testing.assert_close(target.loss_through(pixels, rows, written), expected)
    torch.testing.assert_close(target.answer_loss(pixels, rows), expected)
    shared = pixels[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(target.answer_by_codes(codes, shared, rows), expected)
    assert not guarded.training
    # the codes decide alone: behind other pictures they say the same
    torch.testing.assert_close(target.loss_through(images(3, seed=8), rows, written), expected)
    assert target.succeeded_by_codes(codes, images(3, seed=8), rows).shape == (3,)


def test_answers_behind_written_codes_are_those_of_the_picture_that_has_them(guarded: Any) -> None:
    pixels, rows = images(3, seed=5), torch.arange(3)
    heard: list[str] = []

    def listen(texts: Any, requests: Any) -> list[bool]:
        heard.extend(texts)
        return [True] * len(texts)

    target = CodeTarget(guarded, make_processor(), PROMPTS, OPENINGS, listen)
    target.succeeded_by_codes(target.codes(target.features(pixels)), images(3, seed=8), rows)
    assert heard == target.answers(pixels, rows)


def test_the_verdict_terms_vanish_where_the_verdict_is_as_wanted(guarded: Any) -> None:
    pixels = images(8, seed=4)
    target = code_target(guarded)
    codes = codes_of(guarded, target, pixels)
    flag(guarded.vqguard, {codes[0]})
    flagged = target.refused(pixels)
    assert (target.verdict_loss(pixels)[flagged] > 0).all()
    assert (target.denial_loss(pixels)[~flagged] > 0).all()
    assert ((target.verdict_loss(pixels) == 0) <= ~flagged).all()
    assert ((target.denial_loss(pixels) == 0) <= flagged).all()


def test_the_distance_to_a_verdict_has_no_end_behind_the_wall(guarded: Any) -> None:
    pixels = images(8, seed=4)
    target = code_target(guarded)
    flag(guarded.vqguard, {codes_of(guarded, target, pixels)[0]})
    flagged = target.refused(pixels)
    passing = target.verdict_distance(pixels, flagged=False)
    refused = target.verdict_distance(pixels, flagged=True)
    assert (passing[flagged] > 0).all()
    assert (refused[~flagged] > 0).all()
    assert (target.verdict_loss(pixels)[~flagged] == 0).any()  # there the hinge has no slope
    leaf = pixels.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(target.verdict_distance(leaf, flagged=False).sum(), leaf)
    assert (slope.flatten(1) != 0).any(dim=1).all()


def test_the_attacker_of_a_majority_goes_down_on_the_copies_that_are_judged(guarded: Any) -> None:
    pixels = images(4, seed=4)
    target = code_target(guarded)
    flag(guarded.vqguard, {codes_of(guarded, target, pixels)[0]})
    plain = target.verdict_distance(pixels, flagged=False)
    usual = guarded.vqguard.config
    smoothing = SmoothingSettings(copies=3, noise=0.3)
    guarded.vqguard.config = replace(usual, smoothing=smoothing)
    smoothed = target.verdict_distance(to_8_bit(pixels), flagged=False)
    values = {"pixel_values": target._preprocess(to_8_bit(pixels))}
    mean = target._preprocess.mean, target._preprocess.std
    copies = [
        c["pixel_values"] * mean[1] + mean[0] for c in noisy_copies(values, values, smoothing)
    ]
    guarded.vqguard.config = usual
    expected = torch.stack([target.verdict_distance(c, flagged=False) for c in copies]).mean(dim=0)
    torch.testing.assert_close(smoothed, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(smoothed, plain)


def test_the_evidence_of_regions_shows_the_way_where_codewords_show_none() -> None:
    words = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    guard: Any = SimpleNamespace(
        judging=SimpleNamespace(codebook=SimpleNamespace(weight=words)),
        judge_level="regional",
        safety_map=SimpleNamespace(categories=("gun",)),
    )
    evidence = torch.tensor([[[-2.0, 5.0], [-3.0, 5.0]]], requires_grad=True)
    seen = _Seen(torch.zeros(1, 2, 2), None, evidence)
    for wanted, sign in ((False, 1.0), (True, -1.0)):
        distance = _distance(guard, seen, torch.tensor([False, True]), wanted=wanted)
        (slope,) = torch.autograd.grad(distance.sum(), evidence)
        assert (slope[..., 0].sign() == sign).all()  # every region, not only the deciding one
        assert (slope[..., 1] == 0).all()  # what is no category plays no part


def test_an_answer_s_progress_is_the_share_of_the_opening_that_it_has_said(guarded: Any) -> None:
    target = code_target(guarded)
    rows = torch.tensor([0, 0, 0, 1])
    said = ["w11 w12 w9", "W11, w12 w13.", "w9", ""]
    assert target.progress(said, rows).tolist() == pytest.approx([2 / 3, 1.0, 0.0, 0.0])


def test_the_margin_is_zero_exactly_where_greedy_decoding_has_the_opening_by_a_lead_of_one(
    guarded: Any,
) -> None:
    target, rows = code_target(guarded), torch.arange(3)
    target.aim = "margin"
    loss, lead = target.answer_loss(images(), rows), target.opening_margin(images(), rows)
    assert ((loss == 0) == (lead >= 1)).all()
    assert (loss > 0).any()
