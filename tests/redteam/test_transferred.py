"""A picture that is made on other models, for many requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam import PGD, ThreatModel, UniversalPGD
from vqguard.redteam.attacks.transfer import SurrogateTransfer
from vqguard.redteam.attacks.transferred.ensemble import Ensemble
from vqguard.redteam.attacks.transferred.universal import TransferableUniversal, total_variation
from vqguard.redteam.trial import judged

from .test_attack import Linear, world
from .test_universal import Related, related


def attack(steps: int = 30, **more: Any) -> TransferableUniversal:
    return TransferableUniversal(pgd=PGD(eps_255=16, steps=steps, judge_every=10), **more)


class Unseen(Related):
    """A victim whose loss has no gradient for anybody."""

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        return super().loss(pixels.detach(), request)


def test_it_goes_down_on_the_stand_in_and_is_judged_on_the_victim() -> None:
    known = related(needed=1e9)
    victim = Unseen(known.weight, known.clean, needed=0.1)
    held_out = torch.tensor([9, 10, 11])
    result = attack(stand_in=known, variation=0.0)(victim, victim.clean, held_out=held_out)
    assert result.success.all()
    assert result.held_out_success.all()
    assert (result.adversarial - victim.clean).abs().max() <= 16 / 255 + 1e-6
    assert {number for batch in known.seen for number in batch} == set(range(9))
    assert result.warnings == ()


def test_without_transformations_and_penalty_it_is_the_universal_attack() -> None:
    target = related(needed=1e9)
    pgd = PGD(eps_255=16, steps=12, judge_every=10)
    plain = UniversalPGD(pgd=pgd)(target, target.clean)
    made = TransferableUniversal(pgd=pgd, stand_in=target, draws=1, variation=0.0)
    assert torch.equal(made(target, target.clean).adversarial, plain.adversarial)


def test_the_penalty_makes_the_picture_smoother() -> None:
    target = related(needed=1e9)
    rough, smooth = (
        attack(stand_in=target, variation=weight)(target, target.clean).adversarial
        for weight in (0.0, 50.0)
    )
    assert total_variation(smooth[None]) < 0.7 * total_variation(rough[None])


def test_total_variation_is_that_of_neighbours() -> None:
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    assert float(total_variation(board.expand(1, 3, 6, 6).float())) == 2.0
    assert float(total_variation(torch.full((1, 3, 6, 6), 0.3))) == 0.0


def test_the_same_seed_gives_the_same_picture() -> None:
    target = related(needed=1e9)

    def made(seed: int) -> Tensor:
        pgd = PGD(eps_255=16, steps=6, seed=seed)
        return TransferableUniversal(pgd=pgd, stand_in=target)(target, target.clean).adversarial

    assert torch.equal(made(1), made(1))
    assert not torch.equal(made(1), made(2))


def test_it_needs_a_model_to_be_made_on_and_settings_that_can_be() -> None:
    target = related()
    with pytest.raises(ConfigError, match="--surrogate"):
        attack()(target, target.clean)
    with pytest.raises(ConfigError, match="draws"):
        attack(draws=0)
    with pytest.raises(ConfigError, match="variation"):
        attack(variation=-1.0)


def test_a_surrogate_transfer_goes_down_on_all_of_them_at_once() -> None:
    weight, images = world()
    other = world(seed=3)[0]
    both = Ensemble([Linear(weight), Linear(other)])
    made = SurrogateTransfer(eps_255=8, steps=20, stand_in=both)(Linear(weight), images)
    best = (images - 8 / 255 * (weight + other).sign()).clamp(0, 1)
    torch.testing.assert_close(made.adversarial, best, atol=1e-6, rtol=0)
    assert SurrogateTransfer.threat is ThreatModel.TRANSFER


def test_an_ensemble_is_entered_as_its_members_are_and_succeeds_where_all_do() -> None:
    class Counted(Linear):
        inside = 0

        def __enter__(self) -> Counted:
            self.inside += 1
            return self

        def __exit__(self, *_: object) -> None:
            self.inside -= 1

    weight, images = world()
    easy, hard = Counted(weight, threshold=1e9), Counted(weight, threshold=-1e9)
    both = Ensemble([easy, hard])
    with both, both:
        assert (easy.inside, hard.inside) == (2, 2)
    assert (easy.inside, hard.inside) == (0, 0)
    assert not judged(both, images, torch.arange(4)).any()
    assert judged(Ensemble([easy, easy]), images, torch.arange(4)).all()
    with pytest.raises(InputError, match="same requests"):
        Ensemble([easy, Linear(weight[:2])])
    with pytest.raises(InputError, match="same requests"):
        Ensemble([])
