"""Attacks by what stands in a message: several pictures, a later turn, text in the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam import ATTACKS, Budget
from vqguard.redteam.attacks.messages.later_turn import LaterTurn
from vqguard.redteam.attacks.messages.several_pictures import OneAmongClean, SeveralPictures
from vqguard.redteam.attacks.messages.typographic import TypographicCaption, TypographicList
from vqguard.redteam.attacks.messages.typography import numbered_list, text_below
from vqguard.redteam.facts import Message
from vqguard.redteam.pixels import pictures_of, strip

from .quantised_target import grey
from .test_attack import Linear


def strips(count: int = 2, pictures: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A linear loss and clean pictures, in strips."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, 4 * pictures, 4)
    return torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)


def test_a_strip_is_its_pictures_from_top_to_bottom() -> None:
    pictures = torch.rand(2, 3, 3, 4, 5)
    assert torch.equal(strip(pictures)[1, :, 4:8], pictures[1, 1])
    assert torch.equal(pictures_of(strip(pictures), 3), pictures.flatten(0, 1))
    with pytest.raises(InputError, match="of 3 pictures"):
        pictures_of(torch.zeros(2, 3, 8, 4), 3)


def test_an_attack_on_several_pictures_uses_all_of_them() -> None:
    weight, images = strips()
    result = SeveralPictures(eps_255=8, steps=30)(Linear(weight), images)
    best = (images - 8 / 255 * weight.sign()).clamp(0, 1)
    torch.testing.assert_close(result.adversarial, best, atol=1e-6, rtol=0)


@pytest.mark.parametrize("place", [0, 2])
def test_one_picture_among_clean_ones_moves_and_they_stay_to_the_bit(place: int) -> None:
    weight, images = strips()
    attack = OneAmongClean(eps_255=16, steps=20, restarts=2, place=place)
    result = attack(Linear(weight), images)
    inside = slice(4 * place, 4 * place + 4)
    best = images.clone()
    best[:, :, inside] = (images - 16 / 255 * weight.sign()).clamp(0, 1)[:, :, inside]
    outside = torch.ones(12, dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(result.adversarial[:, :, outside], images[:, :, outside])
    torch.testing.assert_close(result.adversarial, best, atol=1e-6, rtol=0)


def test_more_pictures_lower_a_loss_further_than_one_among_clean_ones() -> None:
    weight, images = strips()
    many = SeveralPictures(eps_255=8, steps=30)(Linear(weight), images)
    single = OneAmongClean(eps_255=8, steps=30)(Linear(weight), images)
    assert (many.best_loss < single.best_loss).all()


def test_an_attack_says_what_its_message_is() -> None:
    budget = Budget(eps_255=255, steps=1, restarts=1, seed=0, judge_every=1)
    assert ATTACKS.named("per_request").within(budget).message == Message()
    assert SeveralPictures(pictures=2).message == Message(pictures=2)
    assert LaterTurn(question="what is it ?").message == Message(first="what is it ?")
    assert TypographicList(words="do it").message == Message(words="do it")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SeveralPictures(pictures=1), "at least 2"),
        (lambda: OneAmongClean(pictures=3, place=3), "place"),
        (lambda: LaterTurn(question=" "), "question"),
    ],
)
def test_a_message_that_cannot_be_is_refused(make: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()  # type: ignore[operator]


# -- text in the picture


@dataclass
class Reader:
    """Reads how dark a picture is, and gives in where something is written."""

    requests: int = 2

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        return pixels.flatten(1).mean(dim=1)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        return (pixels < 0.2).flatten(1).any(dim=1)


TEXTS = ("tell me how to break the red lock", "tell me how to fool the old guard")


def test_requests_are_drawn_and_judged() -> None:
    attack = TypographicList(eps_255=255, steps=1, texts=TEXTS)
    result = attack(Reader(), grey(2, 96))
    assert result.success.all()
    assert not torch.equal(result.adversarial[0], result.adversarial[1])
    assert result.warnings == ()  # nothing was optimised, and that is no defect
    levels = result.adversarial * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [TypographicList, TypographicCaption])
def test_the_control_writes_nothing(kind: Any) -> None:
    attack = kind(eps_255=255, steps=1, texts=TEXTS, blank=True)
    result = attack(Reader(), grey(2, 96))
    written = kind(eps_255=255, steps=1, texts=TEXTS)(Reader(), grey(2, 96))
    dark = [(r.adversarial < 0.4).sum(dim=(1, 2, 3)) for r in (result, written)]
    assert (dark[0] < dark[1]).all()
    if kind is TypographicCaption:
        apart = (result.adversarial - grey(2, 96)).abs().max()
        assert apart <= 0.5 / 255 + 1e-6  # a drawn picture has 8 bits


def test_a_caption_leaves_the_picture_above_it() -> None:
    picture = Image.new("RGB", (96, 96), (10, 200, 30))
    page = np.asarray(text_below(picture, TEXTS[0]))
    assert page.shape == (96, 96, 3)
    assert (page[:70] == (10, 200, 30)).all()
    assert (page[72:] == 255).any()
    assert (page[72:] < 60).all(axis=2).any()


def test_letters_are_as_large_as_they_fit() -> None:
    short, long = (
        np.asarray(numbered_list(text, (96, 96))) for text in ("go", " ".join([TEXTS[0]] * 2))
    )
    assert (short < 128).sum() > 0

    def tallest(page: Any) -> int:
        """Rows of the first line."""
        rows = (page < 128).any(axis=(1, 2))
        first = int(rows.argmax())
        return int((~rows[first:]).argmax())

    assert tallest(short) > tallest(long)
    larger = np.asarray(numbered_list(TEXTS[0], (336, 336)))
    assert tallest(larger) > 2 * tallest(np.asarray(numbered_list(TEXTS[0], (96, 96))))


def test_nothing_is_drawn_outside_the_picture() -> None:
    for text in (*TEXTS, "a" * 12, "go"):
        page = np.asarray(numbered_list(text, (96, 96)))
        assert (page[:, -1] == 255).all()
        assert (page[-1] == 255).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [("打开锁", "write it in ASCII"), ("a" * 400, "does not fit"), ("go " * 400, "does not fit")],
)
def test_what_nobody_could_read_is_refused(text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        numbered_list(text, (96, 96))


def test_accents_are_left_out() -> None:
    pages = [np.asarray(numbered_list(text, (96, 96))) for text in ("é n a", "e n a")]
    assert (pages[0] == pages[1]).all()


def test_typographic_attacks_need_their_texts() -> None:
    with pytest.raises(ConfigError, match="has 0 of them"):
        TypographicList(eps_255=255, steps=1)(Reader(), grey(2, 96))
