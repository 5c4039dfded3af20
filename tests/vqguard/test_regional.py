"""The regional judge: its regions, its projection, its training, and a guard that judges by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqguard import GuardConfig, SafetyMap, VQGuard, straight_through
from vqguard.config import RegionalSettings
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, InputError, NonFiniteError
from vqguard.judging.settings import JudgeSettings
from vqguard.regional.judge import RegionalJudge
from vqguard.regional.layout import Layout, Windows, grid_of
from vqguard.regional.projection import ExactLinear
from vqguard.regional.schedule import RegionalTraining
from vqguard.regional.training import CHECKPOINT_EVERY, LabelledTokens, train_regional

WIDTH = 12
SIZES: dict[str, Any] = {"patch_dim": WIDTH, "semantic_dim": 5, "patch_codes": 9}
SMALL = RegionalSettings(codes=16, width=4, hidden=10, windows=(1, 2))
grids = st.tuples(st.integers(1, 5), st.integers(1, 5))
layouts = st.lists(grids, min_size=1, max_size=3).map(tuple)


def regional_guard(**sizes: Any) -> VQGuard:
    config = {**SIZES, "semantic_codes": 4, "judge": "regional", "regional": SMALL, **sizes}
    return VQGuard(GuardConfig.from_dict(config)).eval()


def tokens_of(layout: Layout) -> int:
    return sum(rows * columns for rows, columns in layout)


@settings(max_examples=60, deadline=None)
@given(layouts, st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True))
def test_regions_are_the_means_of_the_windows_that_they_name(
    layout: Layout, sides: list[int]
) -> None:
    windows = Windows(tuple(sides))
    features = torch.randn(2, tokens_of(layout), 3, generator=torch.Generator().manual_seed(0))
    pooled = windows.pool(features.double(), layout)
    assert pooled.shape[1] == windows.count(layout, features.shape[1])
    starts = [0]
    for rows, columns in layout:
        starts.append(starts[-1] + rows * columns)
    for number in range(pooled.shape[1]):
        region = windows.region(layout, number)
        rows, columns = layout[region.grid]
        start = starts[region.grid]
        grid = features[:, start : start + rows * columns].unflatten(1, (rows, columns))
        wanted = grid[:, region.top : region.bottom, region.left : region.right].double()
        assert torch.allclose(pooled[:, number], wanted.mean(dim=(1, 2)))
        assert 0.0 <= region.box[0] < region.box[2] <= 1.0
        assert 0.0 <= region.box[1] < region.box[3] <= 1.0
    with pytest.raises(InputError, match="regions"):
        windows.region(layout, pooled.shape[1])


def test_an_image_without_a_grid_has_its_tokens_and_the_whole() -> None:
    features = torch.randn(3, 7, 2, dtype=torch.float64)
    pooled = Windows((1, 2)).pool(features, None)
    assert torch.equal(pooled[:, :7], features)
    assert torch.allclose(pooled[:, 7], features.mean(dim=1))
    assert Windows((1, 2)).count(None, 7) == 8


def test_a_grid_has_the_shape_of_the_image() -> None:
    assert grid_of(12, 30, 40) == (3, 4)
    assert grid_of(12, 224, 224) is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 6), st.integers(0, 2**16), st.floats(-30, 30))
def test_the_projection_is_exact_and_knows_no_batch(
    width: int, rows: int, seed: int, power: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = ExactLinear(width, 5)
    layer.start(generator)
    with torch.no_grad():
        layer.bias.copy_(torch.randn(5, generator=generator))
    x = torch.randn(rows, width, generator=generator) * 2.0**power
    with torch.no_grad():
        together = layer(x)
        alone = torch.cat([layer(row[None]) for row in x])
        turned = layer(x.flip(0).contiguous()).flip(0)
    assert torch.equal(together, alone)
    assert torch.equal(together, turned)
    plain = x.double() @ layer.weight.double().T + layer.bias.double()
    scale = x.double().abs().amax(dim=1, keepdim=True) * width
    assert bool(((together - plain).abs() <= 2.0**-17 * scale).all())


def test_the_projection_takes_zeros_and_what_is_hardly_one() -> None:
    layer = ExactLinear(4, 3)
    layer.start(torch.Generator().manual_seed(0))
    x = torch.zeros(2, 4)
    x[1] = 2.0**-149
    with torch.no_grad():
        out = layer(x)
    assert torch.equal(out[0], layer.bias.double())
    assert bool(torch.isfinite(out).all())


@settings(max_examples=25, deadline=None)
@given(layouts, layouts, st.integers(0, 2**16))
def test_an_image_has_the_same_codes_alone_in_a_batch_and_in_half_precision(
    first: Layout, second: Layout, seed: int
) -> None:
    guard = regional_guard()
    generator = torch.Generator().manual_seed(seed)
    known: list[Layout | None] = [first, second, None]
    counts = [tokens_of(first), tokens_of(second), 6]
    images = [torch.randn(n, WIDTH, generator=generator).half().float() for n in counts]
    semantic = torch.randn(3, 1, 5, generator=generator)
    output = guard(images, semantic, layouts=known)
    codes, mask, *_ = output.judged
    assert codes is output.regional_codes
    for number, (image, layout) in enumerate(zip(images, known, strict=True)):
        own = codes[number] if mask is None else codes[number][mask[number]]
        for shown in (image[None], image[None].half(), image[None].double()):
            alone = guard.judged(semantic[number : number + 1], None, shown, [layout])
            assert torch.equal(alone.codes[0], own)
            assert alone.mask is None


def map_of(guard: VQGuard, flagged: set[int]) -> SafetyMap:
    counts = torch.tensor([[3, 0] if code in flagged else [0, 3] for code in range(guard.cells)])
    return SafetyMap(("toxic",), counts, codebook_checksum=guard.checksum(guard.judge_level))


def test_the_verdict_is_that_of_the_worst_region_and_says_where_it_is() -> None:
    guard = regional_guard()
    layout: Layout = ((3, 4),)
    images = torch.randn(2, 12, WIDTH, generator=torch.Generator().manual_seed(1))
    semantic = torch.zeros(2, 1, 5)
    codes, *_ = guard.judged(semantic, None, images, [layout] * 2)
    own = set(codes[0].tolist()) - set(codes[1].tolist())
    assert own
    code = min(own)
    guard.safety_map = map_of(guard, {code})
    output = guard(images, semantic, layouts=[layout] * 2)
    assert output.flagged is not None
    assert output.flagged.tolist() == [True, False]
    verdict, other = guard.judge(semantic, None, images, [layout] * 2)
    assert (verdict.flagged, verdict.semantic_code, other.flagged) == (True, code, False)
    region = guard.region(layout, verdict)
    assert region is not None
    windows = Windows(SMALL.windows)
    assert codes[0, verdict.token] == code
    assert region == windows.region(layout, verdict.token)


def test_cells_under_a_region_are_all_that_it_touches_in_every_grid() -> None:
    windows = Windows((2,))
    layout: Layout = ((2, 3), (5, 6))
    under = windows.cells_under(layout, [0])
    assert under[:6].view(2, 3).tolist() == [[True, True, False]] * 2
    assert under[6:].view(5, 6).tolist() == [[True] * 4 + [False] * 2] * 5
    back = windows.cells_under(layout, [2])  # rows 0 to 2 and columns 0 to 2 of the second grid
    assert back[:6].view(2, 3).tolist() == [[True, False, False], [False] * 3]
    assert int(back[6:].sum()) == 4
    assert not bool(windows.cells_under(layout, []).any())
    with pytest.raises(InputError, match="one of the image's regions"):
        windows.cells_under(layout, [99])


def test_a_global_guard_names_no_region_and_needs_no_tokens() -> None:
    guard = VQGuard(GuardConfig(WIDTH, 5, patch_codes=9, semantic_codes=4)).eval()
    assert guard.regional is None
    guard.safety_map = map_of(guard, {0, 1, 2, 3})
    (verdict,) = guard.judge(torch.zeros(1, 1, 5))
    assert verdict.flagged
    assert guard.region(((2, 2),), verdict) is None
    assert not [name for name in guard.state_dict() if name.startswith("regional")]


def test_what_does_not_fit_is_refused() -> None:
    guard = regional_guard()
    semantic = torch.zeros(1, 1, 5)
    with pytest.raises(InputError, match="visual tokens"):
        guard.judge(semantic)
    with pytest.raises(InputError, match="1 of semantic"):
        guard.judged(semantic, None, torch.zeros(2, 4, WIDTH))
    with pytest.raises(InputError, match="cannot lie"):
        guard(torch.zeros(1, 4, WIDTH), semantic, layouts=[((2, 3),)])
    with pytest.raises(InputError, match="layouts"):
        guard(torch.zeros(1, 4, WIDTH), semantic, layouts=[])
    with pytest.raises(NonFiniteError):
        guard.judged(semantic, None, torch.full((1, 4, WIDTH), torch.nan))
    with pytest.raises(ConfigError, match="windows"):
        RegionalSettings(windows=())
    with pytest.raises(ConfigError, match="windows"):
        RegionalSettings(windows=(2, 2))


def test_a_regional_guard_is_what_it_was_when_it_is_read_again(tmp_path: Path) -> None:
    guard = regional_guard()
    guard.safety_map = map_of(guard, {1, 3})
    guard.save_pretrained(tmp_path)
    read = VQGuard.from_pretrained(tmp_path)
    images = torch.randn(4, 6, WIDTH)
    semantic = torch.zeros(4, 1, 5)
    known: list[Layout | None] = [((2, 3),)] * 4
    assert read.config == guard.config
    assert read.checksum("regional") == guard.checksum("regional")
    mine, theirs = (g(images, semantic, layouts=known) for g in (guard, read))
    assert torch.equal(mine.regional_codes, theirs.regional_codes)
    assert torch.equal(mine.flagged, theirs.flagged)
    document = json.loads((tmp_path / "guard.json").read_text())
    document["checksums"]["regional"] = "0" * 64
    (tmp_path / "guard.json").write_text(json.dumps(document))
    with pytest.raises(ChecksumError, match="regional"):
        VQGuard.from_pretrained(tmp_path)


def test_a_guard_of_an_earlier_version_judges_globally(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "adapters" / "golden" / "guard-only-2" / "guard"
    assert "judge" not in json.loads((folder / "guard.json").read_text())["config"]
    guard = VQGuard.from_pretrained(folder)
    assert (guard.config.judge, guard.regional, guard.judge_level) == ("global", None, "semantic")
    guard.save_pretrained(tmp_path)
    assert VQGuard.from_pretrained(tmp_path).config == guard.config


def test_a_map_for_another_judge_is_refused(tmp_path: Path) -> None:
    guard = regional_guard(semantic_codes=16)
    own = map_of(guard, {0})
    guard.safety_map = own
    counts = own.counts
    paper = SafetyMap(("toxic",), counts, codebook_checksum=guard.checksum("semantic"))
    with pytest.raises(ChecksumError, match=r"regional .*that of the global judge.*calibrate"):
        guard.safety_map = paper
    assert guard.safety_map is own
    with pytest.raises(ConfigError, match="cells"):
        guard.safety_map = map_of(regional_guard(regional={"codes": 3}), {0})
    assert guard.regional is not None
    with torch.no_grad():
        guard.regional.projection.tokens.weight[0, 0] += 1.0  # codes follow from it too
    with pytest.raises(ChecksumError, match="calibrate"):
        guard(torch.zeros(1, 4, WIDTH), torch.zeros(1, 1, 5))
    guard.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError):
        VQGuard.from_pretrained(tmp_path)


def test_casting_leaves_the_judge_as_it_is() -> None:
    guard = regional_guard()
    before = guard.checksum("regional")
    guard.half()
    assert guard.checksum("regional") == before


def test_gradients_reach_the_tokens_only_where_they_are_let_through() -> None:
    guard = regional_guard()
    assert guard.regional is not None
    images = torch.randn(2, 6, WIDTH, requires_grad=True)
    regions = guard.regional.regions(images, [((2, 3),)] * 2).tokens
    exact = guard.regional.regions(images.detach(), [((2, 3),)] * 2).tokens
    assert torch.equal(regions, exact)
    with straight_through(guard):
        guard.regional.quantizer(regions).output.sum().backward()
    assert images.grad is not None
    assert bool((images.grad != 0).any())
    assert not any(p.requires_grad for p in guard.regional.parameters())


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 4 x 4 tokens; two of three hold one token of a category, beside common things."""
    generator = torch.Generator().manual_seed(seed)
    things = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(99)) * 2
    images = torch.randn(count, 16, WIDTH, generator=generator) * 0.6
    marks = torch.zeros(count, 2, dtype=torch.bool)
    for number in range(count):
        images[number, :8] += things[2 + number % 2]
        if number % 3 < 2:
            place = int(torch.randint(16, (1,), generator=generator))
            images[number, place] += things[number % 3]
            marks[number, number % 3] = True
    return images, marks


SCHEDULE = RegionalTraining(steps=150, batch=48, learning_rate=1e-2)


def trained(seed: int = 0) -> RegionalJudge:
    images, marks = scenes(240, 1)
    sizes = RegionalSettings(codes=16, width=4, hidden=32, windows=(1, 2))
    judge = RegionalJudge(WIDTH, sizes, "torch", 0)
    losses = train_regional(
        judge, LabelledTokens([*images], marks, [((4, 4),)] * 240), SCHEDULE, seed=seed
    )
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    return judge


def test_labels_of_images_teach_which_region_is_meant() -> None:
    judge = trained()
    images, marks = scenes(600, 2)
    codes = judge.quantizer.encode(judge.regions(images, [((4, 4),)] * 600).tokens)
    labels = [
        "neutral" if not row.any() else "ab"[int(row.int().argmax())] for row in marks.unbind()
    ]
    learned = tuple(tuple(row) for row in judge.learned_shares(2).tolist())
    made = SafetyMap.calibrate(
        codes[:300],
        labels[:300],
        semantic_codes=16,
        fpr=0.04,
        count="images",
        prior="balanced",
        rule="any",
        judging=JudgeSettings(smoothing=3.0, learned=learned),
    )
    flagged = made.flagged(codes[300:])
    toxic = marks[300:].any(dim=1)
    assert float(flagged[toxic].double().mean()) > 0.9
    assert float(flagged[~toxic].double().mean()) < 0.15
    verdicts = made.judge(codes[300:])
    named = [v.category == want for v, want in zip(verdicts, labels[300:], strict=True)]
    assert sum(named) > 0.85 * len(named)
    again = SafetyMap.from_dict(json.loads(json.dumps(made.to_dict())))
    assert torch.equal(again.scores, made.scores)


def found_among_correlated(whitening: float) -> float:
    """Share of toxic images that is found at no more than 4 % of neutral ones.

    Learnt from a few images whose tokens vary together far more than they differ by category.
    """
    generator = torch.Generator().manual_seed(7)
    source, shared = (torch.randn(WIDTH, generator=generator) for _ in range(2))
    stretch = torch.eye(WIDTH) + 30.0 * torch.outer(source, shared)
    few, marks = scenes(24, 1)
    many, truth = scenes(600, 2)
    sizes = RegionalSettings(codes=16, width=4, hidden=32, windows=(1, 2))
    judge = RegionalJudge(WIDTH, sizes, "torch", 0)
    layout: list[Layout | None] = [((4, 4),)]
    schedule = replace(SCHEDULE, whitening=whitening)
    train_regional(judge, LabelledTokens([*few @ stretch], marks, layout * 24), schedule)
    seen = judge.regions(many @ stretch, layout * 600).tokens.amax(dim=(1, 2))
    toxic = truth.any(dim=1)
    return float((seen[toxic] > seen[~toxic].quantile(0.96)).float().mean())


def test_whitening_finds_more_where_tokens_vary_together() -> None:
    assert found_among_correlated(0.99) > found_among_correlated(0.0) + 0.2


def test_training_follows_from_its_seed_and_leaves_others_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = trained(), trained(), trained(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.checksum() == second.checksum() != other.checksum()


def test_images_that_cannot_teach_are_refused() -> None:
    images, marks = scenes(12, 0)
    layout: list[Layout | None] = [((4, 4),)] * 12
    with pytest.raises(InputError, match="neutral"):
        LabelledTokens([*images[:2]], marks[:2], layout[:2])
    with pytest.raises(InputError, match="of each category"):
        LabelledTokens([*images], torch.zeros_like(marks), layout)
    narrow = RegionalJudge(WIDTH, RegionalSettings(width=1), "torch", 0)
    with pytest.raises(InputError, match=r"regional\.width=2"):
        train_regional(narrow, LabelledTokens([*images], marks, layout), SCHEDULE)
    broken = LabelledTokens([torch.full_like(images[0], torch.inf), *images[1:]], marks, layout)
    judge = RegionalJudge(WIDTH, SMALL, "torch", 0)
    with pytest.raises(NonFiniteError):
        train_regional(judge, broken, SCHEDULE)


class KilledError(Exception):
    """The process is gone."""


def train_until(path: Path | None, killed_at: int, seed: int = 0) -> tuple[str, list[float]]:
    """Checksum and losses of a training, which is killed behind so many steps."""
    images, marks = scenes(120, 1)
    judge = RegionalJudge(WIDTH, RegionalSettings(codes=16, width=4, hidden=8), "torch", 0)
    seen: list[float] = []

    def count(loss: float) -> None:
        seen.append(loss)
        if len(seen) == killed_at:
            raise KilledError

    losses = train_regional(
        judge,
        LabelledTokens([*images], marks, [((4, 4),)] * 120),
        RegionalTraining(steps=2 * CHECKPOINT_EVERY + 10, batch=24, learning_rate=1e-2),
        seed=seed,
        each_step=count,
        checkpoint=path,
    )
    assert seen == losses
    return judge.checksum(), losses


NEVER = 10**6


@pytest.mark.parametrize("killed_at", [3, CHECKPOINT_EVERY + 7, 2 * CHECKPOINT_EVERY])
def test_a_training_that_was_killed_ends_in_the_same_judge(tmp_path: Path, killed_at: int) -> None:
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(KilledError):
        train_until(kept, killed_at)
    assert kept.is_file() == (killed_at >= CHECKPOINT_EVERY)
    assert train_until(kept, NEVER) == train_until(None, NEVER)
    assert train_until(kept, NEVER) == train_until(None, NEVER), "taken up behind its last step"


def test_what_is_kept_of_another_training_is_not_taken_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept.safetensors"
    with pytest.raises(KilledError):
        train_until(kept, CHECKPOINT_EVERY + 1, seed=5)
    other = kept.read_bytes()
    alone = train_until(None, NEVER)
    assert train_until(kept, NEVER) == alone
    assert "of another training" in caplog.text
    for damaged in (other[:-40], b"", b"no tensors at all"):
        kept.write_bytes(damaged)
        assert train_until(kept, NEVER, seed=0) == alone
    assert caplog.text.count("trained anew") == 4


def test_a_learned_prior_counts_where_nothing_was_counted() -> None:
    counts = torch.tensor([[0, 0], [0, 0], [40, 0]])
    learned = ((0.9, 0.1), (0.2, 0.8), (0.5, 0.5))
    made = SafetyMap(("a",), counts, judging=JudgeSettings(smoothing=2.0, learned=learned))
    assert torch.allclose(made.probabilities[:2], torch.tensor(learned[:2]).double())
    assert float(made.probabilities[2, 0]) == pytest.approx(41 / 42)
    with pytest.raises(InputError, match="learned"):
        SafetyMap(("a",), counts, judging=JudgeSettings(smoothing=2.0, learned=learned[:2]))
    with pytest.raises(ConfigError, match="add up to 1"):
        JudgeSettings(learned=((0.9, 0.2),))
