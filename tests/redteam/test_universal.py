"""One image against many requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam import PGD, UniversalPGD


@dataclass
class Related:
    """Linear requests that share a direction; a request falls when its loss drops by `needed`."""

    weight: Tensor
    clean: Tensor
    needed: float
    stopped: bool = False
    seen: list[list[int]] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.weight)

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        self.seen.append(request.tolist())
        if self.stopped:
            pixels = pixels.detach()
        return (self.weight[request] * (pixels - self.clean)).flatten(1).sum(dim=1)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        moved = (self.weight[request] * (pixels - self.clean)).flatten(1).sum(dim=1)
        return moved < -self.needed


def related(needed: float = 0.5, stopped: bool = False) -> Related:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(1, 3, 6, 6, generator=generator)
    own = torch.randn(12, 3, 6, 6, generator=generator)
    clean = torch.rand(3, 6, 6, generator=generator) * 0.6 + 0.2
    return Related(shared + 0.5 * own, clean, needed, stopped)


def test_one_image_improves_every_request_and_the_held_out_ones() -> None:
    target = related(needed=1e9)
    attack = UniversalPGD(pgd=PGD(eps_255=8, steps=40, judge_every=10), requests_per_step=4)
    held_out = torch.tensor([9, 10, 11])
    result = attack(target, target.clean, held_out=held_out)
    attacked = {number for batch in target.seen for number in batch}
    assert attacked == set(range(9))
    after = target.loss(result.adversarial.expand(12, -1, -1, -1), torch.arange(12))
    assert bool((after < -0.1).all())
    assert (result.adversarial - target.clean).abs().max() <= 8 / 255 + 1e-6
    assert result.success.shape == (9,)
    assert result.held_out_success.shape == (3,)
    assert result.mean_loss == pytest.approx(float(after[:9].mean()), rel=1e-5)
    assert result.warnings == ()
    optimum = -8 / 255 * target.weight[:9].mean(dim=0).abs().sum()
    assert result.mean_loss < 0.8 * float(optimum)


def test_all_requests_in_every_step_is_pgd_on_their_mean() -> None:
    target = related(needed=1e9)
    attack = UniversalPGD(pgd=PGD(eps_255=8, steps=12, momentum=0.5), requests_per_step=99)
    result = attack(target, target.clean)
    best = target.clean - 8 / 255 * target.weight.mean(dim=0).sign()
    torch.testing.assert_close(result.adversarial, best.clamp(0, 1), atol=1e-6, rtol=0)


def test_it_stops_when_every_request_falls_and_reports_each() -> None:
    target = related(needed=0.1)
    result = UniversalPGD(pgd=PGD(eps_255=16, steps=100, judge_every=5, restarts=3))(
        target, target.clean, held_out=torch.tensor([0])
    )
    assert result.success.all()
    assert result.held_out_success.all()
    assert result.losses.isnan().any()
    assert result.losses[0] == 0.0


def test_requests_are_drawn_without_replacement_within_an_epoch() -> None:
    target = related(needed=1e9)
    UniversalPGD(pgd=PGD(steps=3, judge_every=100), requests_per_step=4)(target, target.clean)
    assert sorted(target.seen[0] + target.seen[1] + target.seen[2]) == list(range(12))


def test_the_best_judged_image_is_kept_when_later_ones_are_worse() -> None:
    class Bowl(Related):
        judged: list[float]

        def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
            value = (pixels - 0.52).square().flatten(1).sum(dim=1)
            if not value.requires_grad:  # the whole set, evaluated at a judgement
                self.judged.append(float(value[0].detach()))
            return value

    target = Bowl(torch.zeros(2, 3, 6, 6), torch.full((3, 6, 6), 0.5), needed=1e9)
    target.judged = []
    pgd = PGD(eps_255=255, steps=7, step_255=16, momentum=0.9, judge_every=1)
    result = UniversalPGD(pgd=pgd)(target, target.clean)
    assert target.judged[-1] > min(target.judged)
    assert result.mean_loss == pytest.approx(min(target.judged))
    after = (result.adversarial - 0.52).square().sum()
    assert float(after) == pytest.approx(min(target.judged))


def test_the_same_seed_gives_the_same_image() -> None:
    def attack(seed: int, batch_size: int = 32) -> Tensor:
        target = related(needed=1e9)
        pgd = PGD(eps_255=16, steps=5, step_255=2, restarts=2, seed=seed)
        found = UniversalPGD(pgd=pgd, requests_per_step=3)(
            target, target.clean, batch_size=batch_size
        )
        return found.adversarial

    assert torch.equal(attack(1), attack(1, batch_size=5))
    assert not torch.equal(attack(1), attack(2))


def test_a_stopped_gradient_leaves_the_image_and_warns() -> None:
    target = related(stopped=True)
    result = UniversalPGD(pgd=PGD(steps=20, judge_every=5))(target, target.clean)
    assert torch.equal(result.adversarial, target.clean)
    assert not result.success.any()
    assert any("masked" in text for text in result.warnings)
    assert len(target.seen) == 2  # one step and the judgement


def test_a_request_must_not_be_attacked_and_held_out() -> None:
    target = related()
    with pytest.raises(InputError, match="held out"):
        UniversalPGD()(target, target.clean, torch.tensor([0, 1]), torch.tensor([1]))
    with pytest.raises(InputError, match="one image"):
        UniversalPGD()(target, target.clean[None])
    with pytest.raises(ConfigError, match="requests_per_step"):
        UniversalPGD(requests_per_step=0)
