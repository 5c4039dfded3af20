"""Targets of whole messages on a tiny random LLaVA: strips of pictures, a later turn, meanings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from vqguard.adapters.attack_target import GenerationTarget
from vqguard.adapters.code_target import CodeTarget
from vqguard.adapters.later_turn_target import LaterTurnTarget, Turns
from vqguard.codebooks.quantizer import straight_through_estimator, use_estimator
from vqguard.errors import InputError
from vqguard.redteam.attacks.messages.later_turn import LaterTurn
from vqguard.redteam.attacks.messages.several_pictures import OneAmongClean, SeveralPictures
from vqguard.redteam.pixels import strip, to_8_bit

from .test_target_guarded import PROMPTS, always, codes_of, flag, guarded, images, make_processor

__all__ = ["guarded"]
TWO = ["<image> <image> w5 w6 w7", "<image> w8 <image>"]
OPENINGS = ["w11 w12 w13", "w14 w15"]


def two_each() -> Tensor:
    """Two strips of two pictures; the second of the first strip is in no other."""
    return strip(images(3)[[0, 1, 0, 2]].unflatten(0, (2, 2)))


def as_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("mode", ["plain", "straight_through"])
def test_a_strip_is_shown_as_its_pictures(mode: str, guarded: Any) -> None:
    processor = make_processor()
    target = GenerationTarget(guarded, processor, TWO, OPENINGS, gradient=mode)
    assert target.pictures == 2
    pixels = two_each().requires_grad_()
    loss = target.loss(pixels, torch.arange(2))
    (gradient,) = torch.autograd.grad(loss.sum(), pixels)
    assert bool((gradient.unflatten(2, (2, -1)).abs().amax(dim=(1, 3, 4)) > 0).all())
    if mode == "straight_through":
        inputs = processor(
            images=[[as_image(p) for p in row.chunk(2, dim=1)] for row in two_each()],
            text=[f"{prompt} {opening}" for prompt, opening in zip(TWO, OPENINGS, strict=True)],
            return_tensors="pt",
            padding=True,
        )
        with torch.no_grad():
            logits = guarded(**inputs).logits.log_softmax(dim=2)
        for row, opening in enumerate(OPENINGS):
            ids = processor.tokenizer(opening, add_special_tokens=False)["input_ids"]
            end = int(inputs["attention_mask"][row].sum())
            places = range(end - len(ids) - 1, end - 1)
            nats = -sum(float(logits[row, p, i]) for p, i in zip(places, ids, strict=True))
            assert float(loss[row].detach()) == pytest.approx(nats / len(ids), rel=1e-3)


def test_a_message_is_refused_where_any_of_its_pictures_is(guarded: Any) -> None:
    target = GenerationTarget(guarded, make_processor(), TWO, OPENINGS, always)
    pixels = two_each()
    codes = codes_of(guarded, target, pixels)
    flag(guarded.vqguard, {codes[1]})
    expected = [codes[1] in codes[:2], codes[1] in codes[2:]]
    assert expected == [True, False]
    assert target.refused(pixels).tolist() == expected
    assert target.succeeded(pixels, torch.arange(2)).tolist() == [
        not flagged for flagged in expected
    ]


def test_the_verdict_of_every_picture_is_evaded(guarded: Any) -> None:
    processor = make_processor()
    pixels = two_each()
    blind = CodeTarget(guarded, processor, TWO, OPENINGS)
    codes = codes_of(guarded, blind, pixels)
    flag(guarded.vqguard, {codes[1]})
    aware = CodeTarget(guarded, processor, TWO, OPENINGS, evade_verdict=True)
    extra = aware.loss(pixels, torch.arange(2)) - blind.loss(pixels, torch.arange(2))
    assert (extra > 0.2).tolist() == [True, False]
    assert aware.features(pixels).shape[0] == 2


def test_prompts_of_a_batch_show_the_same_number_of_pictures(guarded: Any) -> None:
    with pytest.raises(InputError, match=r"prompt 1 has 1 image tokens.*expected 2"):
        GenerationTarget(guarded, make_processor(), [TWO[0], PROMPTS[0]], OPENINGS)


def test_attacks_on_several_pictures_run_on_a_guarded_model(guarded: Any) -> None:
    target = GenerationTarget(guarded, make_processor(), TWO, OPENINGS, gradient="straight_through")
    clean = two_each()
    many = SeveralPictures(eps_255=16, steps=6, pictures=2)(target, clean)
    single = OneAmongClean(eps_255=16, steps=6, pictures=2, place=1)(target, clean)
    before = target.loss(clean, torch.arange(2))
    assert (many.best_loss <= before + 1e-4).all()
    height = clean.shape[2] // 2
    assert torch.equal(single.adversarial[:, :, :height], clean[:, :, :height])
    assert not torch.equal(single.adversarial, clean)


# -- the request a turn later


def turns() -> Turns:
    def second(number: int, answer: str) -> str:
        return f"{PROMPTS[number]} {answer} w9 w1{number}"

    return Turns(PROMPTS[:2], second, OPENINGS)


def test_what_is_judged_is_the_conversation_as_it_goes(guarded: Any) -> None:
    processor = make_processor()
    clean, attacked = images(2), images(2, seed=9)
    target = LaterTurnTarget(guarded, processor, turns(), clean)
    first = GenerationTarget(guarded, processor, PROMPTS[:2], OPENINGS, max_new_tokens=24)
    both = torch.arange(2)
    said = first.answers(attacked, both)
    assert said != first.answers(clean, both)
    prompts = [turns().second(number, said[number]) for number in range(2)]
    second = GenerationTarget(guarded, processor, prompts, OPENINGS)
    assert target.answers(attacked, both) == second.answers(attacked, both)
    assert target.answers(attacked[1:], both[1:]) == second.answers(attacked, both)[1:]


def test_the_loss_stands_behind_the_answers_to_the_clean_pictures(guarded: Any) -> None:
    processor = make_processor()
    clean, attacked = images(2), images(2, seed=9)
    both = torch.arange(2)
    target = LaterTurnTarget(guarded, processor, turns(), clean, gradient="straight_through")
    first = GenerationTarget(guarded, processor, PROMPTS[:2], OPENINGS, max_new_tokens=24)
    prompts = [turns().second(n, text) for n, text in enumerate(first.answers(clean, both))]
    second = GenerationTarget(guarded, processor, prompts, OPENINGS, gradient="straight_through")
    torch.testing.assert_close(target.loss(attacked, both), second.loss(attacked, both))
    result = LaterTurn(eps_255=32, steps=6)(target, to_8_bit(clean))
    assert (result.best_loss <= second.loss(clean, both) + 1e-4).all()


def test_a_picture_that_is_flagged_is_flagged_in_every_turn(guarded: Any) -> None:
    clean = images(2)
    target = LaterTurnTarget(guarded, make_processor(), turns(), clean)
    target.judge = always
    codes = codes_of(guarded, target, clean)
    flag(guarded.vqguard, {codes[0]})
    assert target.succeeded(clean, torch.arange(2)).tolist() == [False, codes[1] != codes[0]]


# -- what an opening means


def test_the_semantic_aim_compares_the_expected_embedding(guarded: Any) -> None:
    words = ["w11", "w12", "w13"]
    target = GenerationTarget(guarded, make_processor(), PROMPTS, words)
    target.aim = "semantic"
    pixels, rows = images().requires_grad_(), torch.arange(3)
    loss = target.loss(pixels, rows)
    with torch.no_grad():
        table = guarded.get_input_embeddings().weight
        ids = make_processor().tokenizer.convert_tokens_to_ids(words)
        expected = target.next_token(pixels, rows).softmax(dim=1) @ table
        cosine = torch.nn.functional.cosine_similarity(expected, table[ids])
    torch.testing.assert_close(loss.detach(), 1.0 - cosine)
    with use_estimator(guarded, straight_through_estimator):
        (gradient,) = torch.autograd.grad(target.loss(pixels, rows).sum(), pixels)
    assert bool((gradient.flatten(1).abs().amax(dim=1) > 0).all())
