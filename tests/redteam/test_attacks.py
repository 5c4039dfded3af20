"""Each attack of the table: what it must break, what it must keep, and what it must not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam import ATTACKS, PGD, Budget, Goal, Scope
from vqguard.redteam.attacks.adam import Adam
from vqguard.redteam.attacks.apgd import APGD, checkpoints
from vqguard.redteam.attacks.code_match import agreement
from vqguard.redteam.attacks.eot import EOT
from vqguard.redteam.attacks.query import RandomSearch
from vqguard.redteam.attacks.shortcut import TrainedShortcut
from vqguard.redteam.attacks.square import Square, share_of_pixels
from vqguard.redteam.attacks.transfer import Transfer
from vqguard.redteam.code_search import CodeMatch, CodeSearch
from vqguard.redteam.corrupted import blurred, cropped, jpeg, resized
from vqguard.redteam.pixels import row_generators
from vqguard.redteam.quantised import VerdictVictim, nearest_other
from vqguard.redteam.trial import Trial

from .quantised_target import Quarters, grey, wanted_colours
from .test_attack import Linear, Wavy, world

SINGLE = [attack.name for attack in ATTACKS if attack.scope is Scope.PER_REQUEST]
PICTURED = [name for name in SINGLE if name != "code_search"]
NONE = torch.empty(0, dtype=torch.int64)


def attack(name: str, eps: float = 255, steps: int = 30, restarts: int = 1, **more: Any) -> Any:
    made = ATTACKS.named(name).within(Budget(eps, steps, restarts, 0, 5))
    return replace(made, **more)  # type: ignore[type-var]


def ready(made: Any, target: Any) -> Any:
    """With what only a recipe can give: a model to make pictures on, the requests' texts."""
    if made.made_on:
        made = replace(made, stand_in=target)
    if made.name.startswith("typographic"):
        made = replace(made, texts=tuple(f"no {number}" for number in range(target.requests)))
    return made


def run(name: str, target: Any, images: Tensor, **more: Any) -> Any:
    return ready(attack(name, **more), target).measure(target, images, NONE)


def size_of(name: str) -> int:
    """Pictures large enough: letters have a least size."""
    return 48 if name.startswith("typographic") else 8


@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("eps", [8.0, 255.0])
def test_every_attack_stays_in_the_ball_and_leaves_the_clean_pictures_alone(
    name: str, eps: float
) -> None:
    target, images = Quarters(wanted_colours(3)), grey(3, size_of(name))
    before = images.clone()
    result = run(name, target, images, eps=eps, steps=10)
    assert (result.adversarial - images).abs().max() <= eps / 255 + 1e-6
    assert float(result.adversarial.min()) >= 0
    assert float(result.adversarial.max()) <= 1
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", PICTURED)
def test_every_attack_gives_a_picture_the_same_result_alone_and_in_a_batch(name: str) -> None:
    if name in ("shortcut", "eot"):  # what they train or draw is shared by a batch
        return
    wanted, images = wanted_colours(3), grey(3, size_of(name))
    together = run(name, Quarters(wanted), images, steps=8, restarts=2)
    target = Quarters(wanted)
    made = ready(attack(name, steps=8, restarts=2), target)
    victim = target if made.goal is Goal.ANSWER else VerdictVictim(target, made.goal)
    alone = made(victim, images[2:], torch.tensor([2]))
    torch.testing.assert_close(alone.adversarial[0], together.adversarial[2])


@pytest.mark.parametrize("name", PICTURED)
@pytest.mark.parametrize("more", [{}, {"start_255": 8.0}, {"restarts": 2}])
def test_an_attack_says_whether_its_seed_changes_anything(name: str, more: dict[str, Any]) -> None:
    images = grey(2, size_of(name))
    made = [
        ready(attack(name, eps=64, steps=3, seed=seed, **more), Quarters(wanted_colours(2)))
        for seed in (0, 1)
    ]
    found = [
        by_seed.measure(Quarters(wanted_colours(2)), images, NONE).adversarial for by_seed in made
    ]
    if not made[0].seeded:
        assert torch.equal(found[0], found[1])
    elif "start_255" in more and name in ("per_request", "apgd", "joint", "square", "query_only"):
        assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("name", ["code_match", "joint", "shortcut", "adam", "apgd"])
def test_attacks_that_cross_the_quantiser_paint_every_colour(name: str) -> None:
    target = Quarters(wanted_colours(4, seed=3))
    result = run(name, target, grey(4), steps=120, restarts=2)
    assert result.success.all(), name
    assert target.succeeded(result.adversarial, torch.arange(4)).all()


def test_code_search_bounds_what_pictures_do() -> None:
    target = Quarters(wanted_colours(5, seed=1))
    bound = run("code_search", target, grey(5), steps=40, restarts=2)
    assert bound.success.all()
    assert torch.equal(bound.adversarial, grey(5))  # no picture is made
    assert (bound.losses[-1] <= bound.losses[0]).all()


def test_code_search_keeps_to_codes_that_a_small_budget_reaches() -> None:
    target, images = Quarters(wanted_colours(2)), grey(2)
    search = CodeSearch(steps=10, reach=3)
    draws = row_generators(images, 0, 0, torch.arange(2))
    found = search(target, images, torch.arange(2), draws)
    nearest = torch.cdist(target.features(images), target.codewords).topk(3, largest=False).indices
    assert (found.codes[..., None] == nearest).any(dim=-1).all()


def test_a_match_is_zero_exactly_where_all_tokens_are_inside_their_cells() -> None:
    target = Quarters(wanted_colours(1))
    wanted = target.wanted[:1]
    objective = CodeMatch(target, wanted, {0: 0}, verdict_weight=0.0)
    colours = target.codewords[wanted[0]].view(2, 2, 3).permute(2, 0, 1)
    painted = colours.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[None]
    assert float(objective(painted, torch.tensor([0]))) == 0.0
    assert float(agreement(objective, painted, torch.tensor([0]))) == 1.0
    assert float(objective(1.0 - painted, torch.tensor([0]))) > 0.0


def test_the_label_free_attack_leaves_every_cell_without_an_answer_in_sight() -> None:
    images = grey(3)
    clean = Quarters(wanted_colours(3)).codes(Quarters(wanted_colours(3)).features(images))

    class Leaving(Quarters):
        def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
            return (self.codes(self.features(pixels)) == clean[request]).float().mean(dim=1)

    result = run("feature_push", Leaving(wanted_colours(3)), images, eps=96, steps=40)
    assert result.best_loss.tolist() == [0.0] * 3


def test_denial_of_service_has_harmless_pictures_refused() -> None:
    target, images = Quarters(wanted_colours(3)), grey(3)
    assert not target.refused(images).any()
    result = run("denial", target, images, steps=60)
    assert result.success.all()
    assert target.refused(result.adversarial).all()


def red(count: int) -> Tensor:
    """Pictures that the guard of `Quarters` refuses."""
    return torch.tensor([0.85, 0.15, 0.15]).view(1, 3, 1, 1).expand(count, 3, 8, 8).clone()


@pytest.mark.parametrize("name", ["evasion", "evasion_square", "evasion_decisions"])
def test_evasion_has_refused_pictures_pass(name: str) -> None:
    target = Quarters(wanted_colours(3))
    assert target.refused(red(3)).all()
    result = run(name, target, red(3), eps=96, steps=60)
    assert result.success.all()
    assert not target.refused(result.adversarial).any()


def test_denial_needs_no_gradient() -> None:
    target, images = Quarters(wanted_colours(3)), grey(3)
    result = run("denial_square", target, images, steps=200)
    assert target.refused(result.adversarial).all() == result.success.all()
    assert result.success.any()


def test_a_search_by_decisions_sees_no_loss_and_comes_nearer_with_queries() -> None:
    class Silent(Quarters):
        def verdict_distance(self, pixels: Tensor, *, flagged: bool) -> Tensor:
            raise AssertionError("nobody sees the loss")

    few, many = (
        run("evasion_decisions", Silent(wanted_colours(2)), red(2), eps=255, steps=n)
        for n in (2, 80)
    )
    apart = [(r.adversarial - red(2)).abs().amax() for r in (few, many)]
    assert apart[1] < apart[0]


def test_random_noise_is_no_search() -> None:
    target = Quarters(wanted_colours(2))
    result = run("evasion_noise", target, red(2), eps=8, steps=1)
    assert not result.success.any()
    assert ((result.adversarial - red(2)).abs() * 255).round().eq(8).all()


def test_the_trained_shortcut_imitates_the_quantiser_better_than_the_identity() -> None:
    target, images = Quarters(wanted_colours(2)), grey(2)
    trial = Trial(target, images, torch.arange(2), 96.0, 5)
    network = TrainedShortcut(eps_255=96, training_steps=200)._trained(target, trial)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(5))
    features = target.features(images + 0.2 * (noise - 0.5))
    words = target.codewords[target.codes(features)]
    imitated = (network(features) - words).square().mean()
    assert imitated < 0.5 * (features - words).square().mean()


def test_query_only_reads_answers_and_no_loss() -> None:
    class Silent(Quarters):
        def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
            raise AssertionError("nobody sees the loss")

    target = Silent(wanted_colours(1, reach=0.0))  # grey is wanted, and the picture starts there
    result = RandomSearch(eps_255=64, steps=10, judge_every=5)(target, grey(1))
    assert result.success.all()
    assert target.asked == 5  # seen at the first judgement
    with pytest.raises(ConfigError, match="reads answers"):
        RandomSearch(steps=2)(Linear(world()[0]), world()[1])


def test_apgd_is_no_weaker_than_pgd_where_the_step_size_matters() -> None:
    weight, images = world(12, 6, seed=3)
    steps = 40
    pgd = PGD(eps_255=32, steps=steps, step_255=8.0, momentum=0.0)(Wavy(weight), images)
    apgd = APGD(eps_255=32, steps=steps)(Wavy(weight), images)
    assert (apgd.best_loss <= pgd.best_loss + 1e-6).float().mean() > 0.9


def test_apgd_looks_at_the_step_where_the_paper_does() -> None:
    assert checkpoints(100)[:6] == [0, 22, 41, 57, 70, 80]
    assert checkpoints(100)[-1] == 100


@pytest.mark.parametrize("kind", [APGD, Adam])
def test_gradient_attacks_reach_the_analytic_optimum(kind: Any) -> None:
    weight, images = world()
    result = kind(eps_255=8, steps=60)(Linear(weight), images)
    best = (images - 8 / 255 * weight.sign()).clamp(0, 1)
    torch.testing.assert_close(result.best_loss, Linear(weight).value(best, torch.arange(4)))


def test_square_falls_towards_the_optimum_by_the_loss_alone() -> None:
    weight, images = world(3, 6)
    target = Linear(weight.sign())
    result = Square(eps_255=16, steps=400)(target, images)
    best = target.value((images - 16 / 255 * weight.sign()).clamp(0, 1), torch.arange(3))
    clean = target.value(images, torch.arange(3))
    assert ((clean - result.best_loss) > 0.6 * (clean - best)).all()
    assert result.warnings == ()  # no gradient is no defect here


def test_a_square_s_share_is_halved_as_in_the_paper() -> None:
    assert share_of_pixels(0.8, 1, 10_000) == 0.8
    assert share_of_pixels(0.8, 11, 10_000) == 0.4
    assert share_of_pixels(0.8, 9_999, 10_000) == pytest.approx(0.8 / 256)


def test_transfer_goes_down_on_the_stand_in_and_is_judged_on_the_victim() -> None:
    weight, images = world()
    victim = Linear(weight, threshold=1e9)  # it always gives in, once it is asked
    result = Transfer(eps_255=8, steps=20, stand_in=Linear(weight), judge_every=20)(victim, images)
    assert result.success.all()
    best = (images - 8 / 255 * weight.sign()).clamp(0, 1)
    assert (result.best_loss - victim.value(best, torch.arange(4))).abs().max() < 0.1
    assert len(victim.evaluated) == 2 * 4  # its loss is looked at where it is judged only
    with pytest.raises(ConfigError, match="stand_in"):
        Transfer(steps=2)(Linear(weight), images)


def test_expectation_needs_at_least_one_draw() -> None:
    with pytest.raises(ConfigError, match="draws"):
        EOT(draws=0)


@pytest.mark.parametrize("name", [n for n in SINGLE if ATTACKS.named(n).quantised])
def test_attacks_on_a_quantiser_refuse_a_model_without_one(name: str) -> None:
    weight, images = world()
    with pytest.raises(ConfigError, match="none: run it on a guarded model"):
        run(name, Linear(weight), images)


def test_corruptions_of_no_strength_change_nothing() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(cropped(images, 1.0), images)
    torch.testing.assert_close(resized(images, 1.0), images)
    torch.testing.assert_close(blurred(images, 0.05), images)
    assert (jpeg(grey(1), 95) - grey(1)).abs().max() < 0.02


def test_evaluations_until_success_are_counted_over_restarts() -> None:
    target = Quarters(wanted_colours(1, seed=3))
    result = run("apgd", target, grey(1), steps=40, restarts=3)
    assert result.success.all()
    assert 0 < int(result.evaluations[0]) <= 3 * 41
    lost = run("apgd", target, grey(1), eps=1, steps=2)
    assert lost.evaluations.tolist() == [-1]


def test_the_nearest_other_codeword_has_the_distance_and_slope_of_the_least_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 4, generator=generator).requires_grad_()
    words = torch.randn(9, 4, generator=generator)
    codes = torch.cdist(features.detach(), words).argmin(dim=2)
    codes[0, 0] = (codes[0, 0] + 1) % 9  # wanted, and not where the token is
    distances = (features[:, :, None] - words).square().sum(dim=3)
    expected = distances.scatter(2, codes[..., None], float("inf")).amin(dim=2)
    found = nearest_other(features, words, codes)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(value.sum(), features)[0] for value in (found, expected)]
    torch.testing.assert_close(*slopes)


def test_a_search_ends_where_no_loss_is_lower() -> None:
    class Counting(Quarters):
        tried = 0

        def answer_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
            self.tried += 1
            return super().answer_by_codes(codes, pixels, request)

    target, images = Counting(wanted_colours(1)), grey(1)
    draws = row_generators(images, 0, 0, torch.arange(1))
    found = CodeSearch(steps=80)(target, images, torch.arange(1), draws)
    assert float(found.loss) == 0.0
    assert target.tried < 80
    assert found.curve.shape == (81, 1)
    assert (found.curve[target.tried :] == 0.0).all()
