"""Images that are unfamiliar because their visual tokens are far from the patch codebook."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqguard.codebooks.guard_output import Judged
from vqguard.config import GuardConfig
from vqguard.encoder import GuardedEncoder
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, InputError
from vqguard.guard import VQGuard
from vqguard.judging.median import middle_copy
from vqguard.judging.policies import Policy, severity
from vqguard.judging.rules import JudgeRules
from vqguard.judging.settings import JudgeSettings, Unfamiliar
from vqguard.safety_map import SafetyMap

WIDTH = 6
COUNTS = torch.tensor([[8, 0], [0, 8], [0, 8]])  # cell 0 is a gun's


def make_map(**judging: Any) -> SafetyMap:
    return SafetyMap(("gun",), COUNTS, judging=JudgeSettings(**judging))


def visual_map(
    distances: Tensor, budget: float = 0.2, first: bool = False, checksum: str = "abc"
) -> SafetyMap:
    return make_map().with_unfamiliar(budget, distances, first=first, patch_checksum=checksum)


def make_guard(judge: str = "global", **options: Any) -> VQGuard:
    sizes = {"patch_dim": WIDTH, "semantic_dim": 5, "semantic_codes": 3, "patch_codes": 9}
    regional = {"codes": 3, "hidden": 8, "width": 4, "windows": [2]}
    config = {**sizes, "judge": judge, "regional": regional, **options}
    return VQGuard(GuardConfig.from_dict(config)).eval()


def guard_with_map(distance: float, judge: str = "global", first: bool = False) -> VQGuard:
    guard = make_guard(judge)
    known = Unfamiliar(
        distance, 0.1, 0, 9, 0.0, 0.3, "visual", guard.checksum("patch"), first=first
    )
    made = replace(make_map(unfamiliar=known), codebook_checksum=guard.checksum(guard.judge_level))
    guard.safety_map = made
    return guard


def features(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, 12, WIDTH, generator=generator)
    return tokens, torch.randn(count, 1, 5, generator=generator)


@settings(deadline=None, max_examples=60)
@given(
    known=st.lists(st.floats(0, 30), min_size=9, max_size=60),
    far=st.lists(st.floats(0, 60), min_size=1, max_size=9),
    low=st.floats(0.1, 0.9),
    high=st.floats(0.1, 0.9),
)
def test_a_larger_budget_never_makes_an_image_familiar(
    known: list[float], far: list[float], low: float, high: float
) -> None:
    low, high = min(low, high), max(low, high)
    measured, codes = torch.tensor(known), torch.full((len(far), 1), 1)
    strict, loose = (
        visual_map(measured, budget).judge(codes, visual=torch.tensor(far))
        for budget in (high, low)
    )
    for mine, other in zip(strict, loose, strict=True):
        assert mine.category == "unfamiliar" or other.category == "neutral"
    in_order = sorted(zip(far, strict, strict=True), key=lambda pair: pair[0])
    said = [verdict.category == "unfamiliar" for _, verdict in in_order]
    assert said == sorted(said), "what is farther is not more familiar"


def test_over_1000_calibrations_the_budget_of_neutral_images_is_kept() -> None:
    generator = torch.Generator().manual_seed(3)
    n, budget = 199, 0.02
    fresh = torch.rand(20_000, generator=generator)
    rates, covered = [], 0
    for _ in range(1000):
        known = visual_map(torch.rand(n, generator=generator), budget).judging.unfamiliar
        assert known is not None
        rate = float((fresh > known.distance).double().mean())
        rates.append(rate)
        covered += known.low <= rate <= known.high
    error = math.sqrt(budget / n / 1000) + math.sqrt(budget / 20_000)
    assert 0.5 * budget < sum(rates) / 1000 <= budget + 3 * error
    assert covered >= 940


def test_a_toxic_category_is_kept_in_the_reason_where_unfamiliar_wins() -> None:
    known = torch.arange(1.0, 10.0)  # 9 images: the threshold is at 8
    gun, strange = torch.tensor([[0, 1]]), torch.tensor([9.0])
    reported = visual_map(known).judge(gun, visual=strange)[0]
    assert (reported.category, reported.action) == ("gun", "refuse"), "reporting weakens nothing"
    assert reported.reason is not None
    assert reported.reason.also == ("unfamiliar",)
    refused = visual_map(known).with_judging(policies={"unfamiliar": Policy()})
    first = visual_map(known, first=True)
    warned = Policy("warn", warning="It is strange.")
    warning = first.with_judging(policies={"unfamiliar": warned})
    for made, acting in ((refused, "unfamiliar"), (first, "gun"), (warning, "gun")):
        verdict = made.judge(gun, visual=strange)[0]
        assert (verdict.category, verdict.action, verdict.flagged) == ("unfamiliar", "refuse", True)
        assert made.judging.acting(verdict) == acting, "whose texts are said"
        assert verdict.reason is not None
        assert verdict.reason.also == ("gun",)
        assert (verdict.reason.score, verdict.reason.threshold) == (9.0, 8.0)
        assert verdict.probability == 1.0, "the score of the gun"
        assert made.flagged(gun, visual=strange).tolist() == [True]
        assert made.judge(gun, visual=torch.tensor([8.0]))[0].category == "gun"
        assert made.judge(gun)[0].category == "gun", "without a distance nothing is unfamiliar"
    neutral = torch.tensor([[1, 2]])
    for made, action in ((refused, "refuse"), (first, "report"), (warning, "warn")):
        verdict = made.judge(neutral, visual=strange)[0]
        assert (verdict.category, verdict.action) == ("unfamiliar", action)
        assert verdict.reason is not None
        assert verdict.reason.also == ()
        assert made.flagged(neutral, visual=strange).tolist() == [action != "report"]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_flags_are_those_of_the_verdicts(data: st.DataObject) -> None:
    draw = data.draw
    actions = st.sampled_from([Policy("report"), Policy("blank"), Policy(), Policy("raise")])
    made = visual_map(torch.arange(1.0, 10.0), first=draw(st.booleans())).with_judging(
        policies=draw(st.dictionaries(st.sampled_from(["gun", "unfamiliar"]), actions)),
        thresholds=draw(st.sampled_from([{}, {"gun": 0.4}])),
    )
    codes = torch.tensor(
        draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=1))
    )
    visual = torch.tensor(
        draw(st.lists(st.floats(0, 20), min_size=len(codes), max_size=len(codes)))
    )
    verdicts = made.judge(codes, visual=visual)
    assert [v.flagged for v in verdicts] == made.flagged(codes, visual=visual).tolist()
    for verdict in verdicts:
        named = () if verdict.reason is None else (verdict.category, *verdict.reason.also)
        # being unfamiliar never makes what is done milder
        actions_of = [made.judging.policy(name).action for name in named]
        assert verdict.action == max(actions_of, key=severity, default="none")
        assert len(set(named)) == len(named)
        assert ("gun" in named) == (0 in verdict.codes)


@pytest.mark.parametrize("judge", ["global", "regional"])
def test_an_image_is_as_unfamiliar_alone_as_in_a_batch(judge: str) -> None:
    tokens, semantic = features(7)
    layouts: Any = [((3, 4),)] * 7
    guard = guard_with_map(1.0, judge)
    middle = float(guard.visual_distances(tokens).median())
    guard = guard_with_map(middle, judge)
    together = guard.judge(semantic, None, tokens, layouts)
    named = [() if v.reason is None else (v.category, *v.reason.also) for v in together]
    far = guard.visual_distances(tokens) > middle
    assert ["unfamiliar" in names for names in named] == far.tolist()
    assert int(far.sum()) == 3
    output = guard(tokens, semantic, layouts=layouts)
    assert output.flagged is not None
    assert output.flagged.tolist() == [verdict.flagged for verdict in together]
    assert guard.located(guard.judge_codes(*output.judged), layouts) == together
    for row in range(7):
        one = slice(row, row + 1)
        for shown in (tokens[one], [tokens[row]], tokens[one].double()):
            alone = guard.judge(semantic[one], None, shown, layouts[one])
            assert alone == [together[row]]
    apart = (guard.patch.lookup(guard.patch.encode(tokens)).double() - tokens.double()).norm(dim=2)
    assert torch.allclose(guard.visual_distances(tokens), apart.pow(8).mean(dim=1).pow(1 / 8))


def test_all_of_an_unfamiliar_image_decides() -> None:
    guard = guard_with_map(0.0, "regional", first=True)
    tokens, semantic = features(1)
    layout: Any = ((3, 4),)
    [verdict] = guard.judge(semantic, None, tokens, [layout])
    assert verdict.category == "unfamiliar"
    assert verdict.reason is not None
    assert verdict.reason.region is None
    assert guard.region(layout, verdict) is None


def test_it_comes_back_from_disk_and_binds_the_patch_codebook(tmp_path: Path) -> None:
    guard = guard_with_map(1.0)
    tokens, semantic = features(4)
    guard.save_pretrained(tmp_path)
    again = VQGuard.from_pretrained(tmp_path)
    assert again.judge(semantic, None, tokens) == guard.judge(semantic, None, tokens)
    made = guard.safety_map
    assert made is not None
    assert again.safety_map is not None
    assert again.safety_map.version == made.version
    with torch.no_grad():
        again.patch.codebook.weight[0] += 1.0
    with pytest.raises(ChecksumError, match="patch codebook"):
        again.judge(semantic, None, tokens)
    with pytest.raises(ChecksumError, match="patch codebook"):
        again(tokens, semantic)
    other = make_guard(seed=5)
    other.semantic.load_state_dict(guard.semantic.state_dict())
    with pytest.raises(ChecksumError, match="patch codebook"):
        other.safety_map = made
    broken = json.loads((tmp_path / "guard.json").read_text())
    broken["safety_map"]["judging"]["unfamiliar"]["codebook_checksum"] = ""
    with pytest.raises(ArtefactError, match="codebook_checksum"):
        SafetyMap.from_dict(broken["safety_map"])


def test_maps_that_know_nothing_of_it_are_read_and_written_as_ever() -> None:
    old = make_map().with_unfamiliar(0.2, torch.arange(1.0, 10.0))
    written = old.to_dict()["judging"]["unfamiliar"]
    assert sorted(written) == ["budget", "distance", "flagged", "high", "low", "n"]
    again = SafetyMap.from_dict(json.loads(json.dumps(old.to_dict())))
    assert again.judging.unfamiliar == old.judging.unfamiliar
    assert again.version == old.version
    new = visual_map(torch.arange(1.0, 10.0), first=True)
    known = SafetyMap.from_dict(json.loads(json.dumps(new.to_dict()))).judging.unfamiliar
    assert known == new.judging.unfamiliar
    assert known is not None
    assert (known.by, known.first, known.codebook_checksum) == ("visual", True, "abc")


def test_where_it_cannot_be_had_that_is_said_by_name() -> None:
    alone = make_guard(levels="semantic")
    known = Unfamiliar(1.0, 0.1, 0, 9, 0.0, 0.3, "visual", alone.checksum("patch"))
    made = make_map(unfamiliar=known)
    with pytest.raises(ConfigError, match="a judge alone"):
        alone.safety_map = replace(made, codebook_checksum=alone.checksum("semantic"))
    with pytest.raises(ConfigError, match="a judge alone"):
        alone.visual_distances(features(1)[0])
    guard = guard_with_map(1.0)
    tokens, semantic = features(2)
    with pytest.raises(InputError, match="tokens="):
        guard.judge(semantic)
    with pytest.raises(InputError, match=r"visual=guard\.visual_distances"):
        guard.judge_codes(guard.encode_semantic(semantic))
    assert guard.safety_map is not None
    for bad in (torch.ones(3), torch.tensor([1.0, math.nan]), torch.tensor([1, 2])):
        with pytest.raises(InputError, match="distance"):
            guard.safety_map.judge(guard.encode_semantic(semantic), visual=bad)
    with pytest.raises(InputError, match="use at least 99 of them"):
        visual_map(torch.rand(20), 0.01)
    for wrong in ({"unfamiliar_by": "visual"}, {"unfamiliar_first": True}):
        with pytest.raises(ConfigError, match="unfamiliar: give a share"):
            JudgeRules.from_dict(wrong)
    assert guard([tokens[0], tokens[1, :0]], semantic).visual_distances[1] == 0.0


def test_copies_have_a_median_distance_whatever_they_score() -> None:
    made = visual_map(torch.arange(1.0, 10.0)).with_judging(policies={"unfamiliar": Policy()})
    copies = [
        Judged(torch.tensor([[code]]), None, None, torch.tensor([far]))
        for code, far in ((0, 1.0), (1, 9.0), (1, 20.0))
    ]
    middle = middle_copy(made, copies)
    assert middle.visual is not None
    assert middle.visual.tolist() == [9.0]
    assert made.judge(*middle)[0].category == "unfamiliar"


def test_an_encoder_is_calibrated_by_its_visual_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    guard = make_guard(semantic_dim=WIDTH)

    def encoder(pixels: Tensor) -> Tensor:
        return pixels.flatten(2).transpose(1, 2).repeat(1, 1, 2)

    guarded = GuardedEncoder(encoder, guard, global_token="mean")
    images = torch.rand(40, 3, 4, 4, generator=generator)
    labels = ["gun"] * 10 + ["neutral"] * 30
    made = guarded.calibrate(
        images, labels, tau=0.6, unfamiliar=0.1, unfamiliar_by="visual", unfamiliar_first=True
    )
    known = made.judging.unfamiliar
    assert known is not None
    assert (known.by, known.first, known.n) == ("visual", True, 30)
    assert known.codebook_checksum == guard.checksum("patch")
    strange = guarded.screen(images[:3] + 50.0)
    assert {verdict.category for verdict in strange} == {"unfamiliar"}
    alone = GuardedEncoder(
        encoder, make_guard(semantic_dim=WIDTH, levels="semantic"), global_token="mean"
    )
    with pytest.raises(ConfigError, match="a judge alone"):
        alone.calibrate(images, labels, tau=0.6, unfamiliar=0.1, unfamiliar_by="visual")
