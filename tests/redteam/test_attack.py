"""The base of the attacks and PGD, on targets whose best answer is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam import PGD, Attack, Trial
from vqguard.redteam.attacks.pgd import step_scale


@dataclass
class Linear:
    """loss = <w, x>; succeeds below a threshold. The optimum in the ball is clean - eps sign(w)."""

    weight: Tensor
    threshold: float = -math.inf
    evaluated: list[int] = field(default_factory=list)
    judged: list[int] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.weight)

    def value(self, pixels: Tensor, request: Tensor) -> Tensor:
        return (self.weight[request] * pixels).flatten(1).sum(dim=1)

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        self.evaluated += request.tolist()
        return self.value(pixels, request)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        self.judged += request.tolist()
        return self.value(pixels, request) < self.threshold


class Wavy(Linear):
    """Many local minima, so that starts matter."""

    def value(self, pixels: Tensor, request: Tensor) -> Tensor:
        waves = torch.sin(40.0 * pixels + 10.0 * self.weight[request]) + 0.3 * pixels
        return waves.flatten(1).mean(dim=1)


class Stopped(Linear):
    """The paper's threat model: no path from the loss to the pixels."""

    def value(self, pixels: Tensor, request: Tensor) -> Tensor:
        return super().value(pixels.detach(), request)


class Flat(Linear):
    """A path is there, and its gradient is zero."""

    def value(self, pixels: Tensor, request: Tensor) -> Tensor:
        return super().value(pixels * 0.0, request)


class Poisoned(Linear):
    """Row 0 is NaN, the others are linear."""

    def value(self, pixels: Tensor, request: Tensor) -> Tensor:
        return super().value(pixels, request) * torch.where(request == 0, math.nan, 1.0)


def world(count: int = 4, size: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 3, size, size, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator), images


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_pgd_reaches_the_analytic_optimum_of_a_linear_loss(decay: str, momentum: float) -> None:
    weight, images = world()
    attack = PGD(eps_255=8, steps=30, step_255=1.0, momentum=momentum, decay=decay)  # type: ignore[arg-type]
    result = attack(Linear(weight), images)
    best = (images - 8 / 255 * weight.sign()).clamp(0, 1)
    torch.testing.assert_close(result.adversarial, best, atol=1e-6, rtol=0)
    assert result.warnings == ()
    torch.testing.assert_close(result.best_loss, Linear(weight).value(best, torch.arange(4)))


@settings(max_examples=60, deadline=None)
@given(
    eps=st.floats(0.1, 255),
    step=st.floats(0.1, 255),
    momentum=st.floats(0, 1),
    decay=st.sampled_from(["constant", "linear", "cosine"]),
    restarts=st.integers(1, 3),
    extreme=st.booleans(),
    stopped=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_ball_and_the_pixel_range_hold_at_every_evaluation(
    eps: float,
    step: float,
    momentum: float,
    decay: str,
    restarts: int,
    extreme: bool,
    stopped: bool,
    seed: int,
) -> None:
    weight, images = world(2, 3, seed)
    images = images.round() if extreme else images
    seen: list[Tensor] = []

    class Watching(Wavy):
        def value(self, pixels: Tensor, request: Tensor) -> Tensor:
            assert pixels.min() >= 0
            assert pixels.max() <= 1
            assert (pixels - images[request]).abs().max() <= eps / 255 + 1e-6
            seen.append(pixels)
            return super().value(pixels.detach() if stopped else pixels, request)

    attack = PGD(
        eps_255=eps,
        steps=4,
        step_255=step,
        momentum=momentum,
        decay=decay,  # type: ignore[arg-type]
        restarts=restarts,
        judge_every=2,
        seed=seed,
    )
    result = attack(Watching(weight), images)
    assert seen
    assert (result.adversarial - images).abs().max() <= eps / 255 + 1e-6
    assert result.adversarial.min() >= 0
    assert result.adversarial.max() <= 1


def test_more_restarts_never_make_it_worse() -> None:
    weight, images = world(6)
    results = [
        PGD(eps_255=32, steps=6, step_255=4, restarts=restarts, judge_every=3)(
            Wavy(weight, threshold=-0.75), images
        )
        for restarts in (1, 2, 4, 8)
    ]
    improved = 0
    for fewer, more in itertools.pairwise(results):
        assert bool((more.success | ~fewer.success).all())
        failed = ~fewer.success & ~more.success
        assert bool((more.best_loss[failed] <= fewer.best_loss[failed]).all())
        improved += int((more.best_loss < fewer.best_loss).sum())
    assert improved > 0


def test_the_best_iterate_is_kept_when_the_last_is_worse() -> None:
    class Bowl(Linear):
        def value(self, pixels: Tensor, request: Tensor) -> Tensor:
            return (pixels - 0.52).square().flatten(1).sum(dim=1)

    weight, _ = world(1)
    images = torch.full((1, 3, 5, 5), 0.5)
    result = PGD(eps_255=255, steps=7, step_255=16, momentum=0.9)(Bowl(weight), images)
    finite = result.losses[:, 0]
    assert finite[-1] > finite.min()
    assert result.best_loss[0] == finite.min()
    torch.testing.assert_close(
        Bowl(weight).value(result.adversarial, torch.arange(1))[0], finite.min()
    )


def test_the_same_seed_gives_the_same_result_in_any_batch() -> None:
    weight, images = world(5)
    attack = PGD(eps_255=128, steps=5, step_255=3, restarts=3, seed=7)
    whole = attack(Wavy(weight), images)
    again = attack(Wavy(weight), images, batch_size=2)
    assert torch.equal(whole.adversarial, again.adversarial)
    assert torch.equal(whole.losses, again.losses)
    order = torch.tensor([3, 1])
    some = attack(Wavy(weight), images[order], order)
    assert torch.equal(some.adversarial, whole.adversarial[order])
    other = PGD(eps_255=128, steps=5, step_255=3, restarts=3, seed=8)(Wavy(weight), images)
    assert not torch.equal(other.adversarial, whole.adversarial)


def recording(starts: list[Tensor]) -> type[Attack]:
    """An attack that notes where each restart starts, and stays there."""

    class Record(Attack):
        def run(self, trial: Trial, start: Tensor) -> None:
            starts.append(start)
            trial.close(start)

    return Record


def test_restart_zero_starts_at_the_clean_image_and_the_others_do_not() -> None:
    weight, images = world(2)
    starts: list[Tensor] = []
    recording(starts)(eps_255=16, steps=1, restarts=3)(Linear(weight), images)
    assert torch.equal(starts[0], images)
    assert len(starts) == 3
    assert not torch.equal(starts[1], images)
    assert not torch.equal(starts[1], starts[2])


def test_restart_zero_may_start_near_the_clean_image_where_the_seed_says() -> None:
    weight, images = world(2)
    starts: list[Tensor] = []
    record = recording(starts)
    for seed in (0, 1):
        record(eps_255=255, steps=1, seed=seed, start_255=8)(Linear(weight), images)
    record(eps_255=4, steps=1, start_255=8)(Linear(weight), images)
    assert not torch.equal(starts[0], starts[1])
    for start, radius in zip(starts, (8, 8, 4), strict=True):
        assert 0.5 * radius < float((start - images).abs().max() * 255) <= radius + 1e-4
    with pytest.raises(ConfigError, match="start_255"):
        PGD(start_255=-1)


def test_an_image_that_succeeded_is_not_attacked_any_more() -> None:
    weight, images = world(3)
    values = Linear(weight).value(images, torch.arange(3))
    lowest = Linear(weight).value((images - 8 / 255 * weight.sign()).clamp(0, 1), torch.arange(3))
    # image 0 succeeds at once, the others never
    weight_target = Linear(weight, threshold=0.0)

    def only_first(pixels: Tensor, request: Tensor) -> Tensor:
        weight_target.judged.extend(request.tolist())
        return request == 0

    weight_target.succeeded = only_first  # type: ignore[method-assign]
    result = PGD(eps_255=8, steps=20, judge_every=5, restarts=2)(weight_target, images)
    assert result.success.tolist() == [True, False, False]
    assert weight_target.evaluated.count(0) == 5
    assert weight_target.evaluated.count(1) == 2 * 21
    assert result.losses.shape == (21, 3)
    assert result.losses[5:, 0].isnan().all()
    assert result.losses[:, 1:].isfinite().all()
    assert bool((values >= lowest).all())


def test_success_is_scored_by_the_judge_and_not_by_the_loss() -> None:
    weight, images = world(3)
    floor = Linear(weight).value((images - 8 / 255 * weight.sign()).clamp(0, 1), torch.arange(3))
    result = PGD(eps_255=8, steps=20)(Linear(weight, threshold=float(floor[1]) + 1e-3), images)
    expected = floor < float(floor[1]) + 1e-3
    assert result.success.tolist() == expected.tolist()


def test_a_judge_that_changes_its_mind_counts_as_failure_and_is_reported() -> None:
    weight, images = world(1)
    target = Linear(weight)
    answers = iter([True, False])
    target.succeeded = lambda pixels, request: torch.tensor([next(answers)])  # type: ignore[method-assign]
    result = PGD(steps=2, judge_every=1)(target, images)
    assert result.success.tolist() == [False]
    assert any("not stable" in text for text in result.warnings)


@pytest.mark.parametrize("kind", [Stopped, Flat])
def test_a_masked_gradient_is_reported_and_the_image_does_not_move(kind: type[Linear]) -> None:
    weight, images = world(3)
    result = PGD(eps_255=8, steps=10)(kind(weight), images)
    assert torch.equal(result.adversarial, images)
    assert any("masked gradient: 3 of 3" in text for text in result.warnings)
    assert not result.success.any()
    assert bool((result.losses == result.losses[:1]).all())


def test_a_stopped_gradient_is_a_search_over_starts_that_costs_one_evaluation_each() -> None:
    weight, images = world(2)
    target = Stopped(weight)
    result = PGD(eps_255=16, steps=50, restarts=4)(target, images)
    assert len(target.evaluated) == 4 * 2
    assert bool((result.best_loss < Linear(weight).value(images, torch.arange(2))).any())
    assert any("search over 4 starts" in text for text in result.warnings)


def test_no_warning_when_only_the_start_has_a_zero_gradient() -> None:
    class Kink(Linear):
        def value(self, pixels: Tensor, request: Tensor) -> Tensor:
            return (pixels - 0.5).clamp_min(0).flatten(1).sum(dim=1)

    weight, _ = world(1)
    images = torch.full((1, 3, 5, 5), 0.4)
    result = PGD(eps_255=255, steps=10, restarts=2, step_255=4)(Kink(weight), images)
    assert result.warnings == ()


def test_a_loss_that_is_not_finite_is_reported_and_leaves_the_others_alone() -> None:
    weight, images = world(3)
    result = PGD(eps_255=8, steps=12, restarts=2)(Poisoned(weight), images)
    assert any("loss not finite: 1 of 3" in text for text in result.warnings)
    clean = PGD(eps_255=8, steps=12, restarts=2)(Linear(weight), images)
    assert torch.equal(result.adversarial[1:], clean.adversarial[1:])
    assert result.adversarial.isfinite().all()
    assert result.best_loss[0] == math.inf


def test_momentum_follows_the_published_formula() -> None:
    class Turning(Linear):
        def value(self, pixels: Tensor, request: Tensor) -> Tensor:
            return (pixels - 0.5).square().mul(self.weight[request]).flatten(1).sum(dim=1)

    weight, images = world(2)
    attack = PGD(eps_255=255, steps=6, step_255=20, momentum=0.7, decay="linear")
    iterates: list[Tensor] = []
    target = Turning(weight)
    plain_value = target.value

    def watching(pixels: Tensor, request: Tensor) -> Tensor:
        iterates.append(pixels.detach())
        return plain_value(pixels, request)

    target.loss = watching  # type: ignore[method-assign]
    attack(target, images)
    pixels, velocity = images.double(), torch.zeros_like(images).double()
    for step in range(6):
        torch.testing.assert_close(iterates[step].double(), pixels, atol=1e-5, rtol=0)
        gradient = 2 * (pixels - 0.5) * weight.double()
        norm = gradient.abs().flatten(1).sum(dim=1).view(-1, 1, 1, 1)
        velocity = 0.7 * velocity + gradient / norm
        pixels = (pixels - 20 / 255 * (1 - step / 6) * velocity.sign()).clamp(0, 1)


def test_step_sizes_fall_as_named() -> None:
    assert [step_scale("constant", step, 4) for step in range(4)] == [1.0] * 4
    assert [step_scale("linear", step, 4) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = [step_scale("cosine", step, 4) for step in range(4)]
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[2] == pytest.approx(0.5)


def test_a_target_that_is_a_context_is_entered_once_around_everything() -> None:
    class Guarded(Linear):
        depth = 0
        entries = 0

        def __enter__(self) -> Guarded:
            self.depth += 1
            self.entries += 1
            return self

        def __exit__(self, *error: object) -> None:
            self.depth -= 1

        def value(self, pixels: Tensor, request: Tensor) -> Tensor:
            assert self.depth == 1
            return super().value(pixels, request)

    weight, images = world(4)
    target = Guarded(weight)
    PGD(steps=2, restarts=2)(target, images, batch_size=2)
    assert (target.depth, target.entries) == (0, 1)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (torch.zeros(3, 4, 4), "(B, 3, H, W)"),
        (torch.zeros(0, 3, 4, 4), "(B, 3, H, W)"),
        (torch.zeros(1, 1, 4, 4), "(B, 3, H, W)"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.float64), "float32"),
        (torch.full((1, 3, 4, 4), 2.0), "[0, 1]"),
        (torch.full((1, 3, 4, 4), math.nan), "[0, 1]"),
    ],
)
def test_images_of_another_kind_are_refused(images: Tensor, says: str) -> None:
    with pytest.raises(InputError) as caught:
        PGD(steps=1)(Linear(torch.zeros(1, 3, 4, 4)), images)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "requests",
    [torch.tensor([0]), torch.tensor([0, 2]), torch.tensor([0, -1]), torch.tensor([0.0, 1.0])],
)
def test_requests_that_do_not_fit_are_refused(requests: Tensor) -> None:
    with pytest.raises(InputError, match="request"):
        PGD(steps=1)(Linear(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4), requests)


def test_a_loss_averaged_over_the_batch_is_refused() -> None:
    target = Linear(torch.zeros(2, 3, 4, 4))
    target.loss = lambda pixels, request: pixels.mean()  # type: ignore[method-assign]
    with pytest.raises(InputError, match="average"):
        PGD(steps=1)(target, torch.zeros(2, 3, 4, 4))


def test_a_bad_setting_is_refused_and_all_are_named() -> None:
    with pytest.raises(ConfigError) as caught:
        PGD(eps_255=300, steps=0, step_255=0, momentum=2, decay="fast")  # type: ignore[arg-type]
    for name in ("eps_255", "steps", "step_255", "momentum", "decay"):
        assert name in str(caught.value)
