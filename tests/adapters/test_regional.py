"""The regional judge in whole models: where tokens lie, who is refused, what is saved."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard import SafetyMap, recording, use_estimator
from vqguard.adapters import (
    build_guard,
    get_adapter,
    guard_encoder,
    guard_model,
    load_guarded,
    save_guard_only,
)
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.runtime.quantise import visual_features
from vqguard.errors import FlaggedImageError
from vqguard.guard import VQGuard
from vqguard.judging.policies import Policy
from vqguard.judging.verdict import DecidingRegion, Reason
from vqguard.regional.layout import Layout

REFUSAL = (7, 8, 9)
REGIONAL = {"codes": 24, "width": 8, "hidden": 16, "windows": [1, 2]}
GRIDS: list[tuple[str, str, Layout]] = [
    ("llava", "projected", ((4, 4),)),
    ("llava", "encoder", ((4, 4),)),
    ("vipllava", "projected", ((4, 4),)),
    ("video_llava", "projected", ((4, 4),)),
    ("llava_next", "projected", ((4, 4), (8, 8))),
    ("llava_next", "encoder", ((4, 4),) * 5),
    ("llava_onevision", "encoder", ((4, 4),) * 5),
    ("paligemma", "projected", ((4, 4),)),
    ("gemma3", "projected", ((2, 2),)),
]


@pytest.mark.parametrize(("kind", "site", "layout"), GRIDS)
def test_tokens_lie_where_their_part_of_the_picture_is(
    kind: str, site: Any, layout: Layout
) -> None:
    """Of the first grid: what is redrawn in one cell moves that cell's token the most."""
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1), modality="image")
    pixels = inputs["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        usual = visual_features(model, site, **inputs)
        assert usual.layouts is not None
        assert usual.layouts[0] == layout
        rows, columns = layout[0]
        height, width = pixels.shape[-2] // rows, pixels.shape[-1] // columns
        right = 0
        for cell in range(rows * columns):
            top, left = cell // columns * height, cell % columns * width
            moved = torch.zeros(len(usual.tokens[0]))
            for _ in range(4):
                other = pixels.clone()
                window = other[0, ..., top : top + height, left : left + width]
                window += 3 * torch.randn(window.shape, generator=generator)
                features = visual_features(model, site, **{**inputs, "pixel_values": other})
                moved += (features.tokens[0] - usual.tokens[0]).norm(dim=-1)
            right += int(moved[: rows * columns].argmax()) == cell
    assert right > 0.6 * rows * columns


@pytest.mark.parametrize("kind", ["qwen2_vl", "blip-2"])
def test_layouts_are_told_or_left_open(kind: str) -> None:
    model = build_tiny(kind)
    features = visual_features(model, **make_inputs(model, (1, 1), modality="image"))
    expected = [((2, 2),), ((2, 4),)] if kind == "qwen2_vl" else [None, None]
    assert features.unit_layouts == expected


def regional_model(flagged: bool) -> tuple[Any, dict[str, Any]]:
    """A tiny model that flags the first of two pictures, or none; and the two, a row each."""
    model: Any = build_tiny("llava")
    inputs = make_inputs(model, (1, 1))
    guard = build_guard(
        model, patch_codes=8, semantic_codes=4, judge="regional", regional=REGIONAL, search="torch"
    ).eval()
    features = visual_features(model, **inputs)
    assert guard.regional is not None
    regions = guard.regional.regions(features.tokens, features.layouts).tokens
    guard.regional.quantizer.codebook.start_from(regions.flatten(0, 1).detach(), "sample")
    codes, *_ = guard.judged(features.semantic, None, features.tokens, features.layouts)
    own = set(codes[0].tolist()) - set(codes[1].tolist())
    counts = torch.tensor([[int(flagged and c in own), 1] for c in range(guard.cells)])
    counts[:, 1] -= counts[:, 0]
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("regional"))
    guard_model(model, guard, refusal_ids=REFUSAL)
    return model, inputs


def test_generate_refuses_the_row_of_a_flagged_region_and_screen_says_so() -> None:
    model, inputs = regional_model(flagged=True)
    verdicts = model.screen(**inputs)
    assert [verdict.flagged for verdict in verdicts] == [True, False]
    region = model.vqguard.region(((4, 4),), verdicts[0])
    assert 0.0 <= region.box[0] < region.box[2] <= 1.0
    where = DecidingRegion("picture", 0, *region.box)
    assert verdicts[0].reason.region == where
    assert verdicts[0].to_dict()["reason"]["region"] == asdict(where)
    assert verdicts[1].reason is None
    output = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert [verdict.to_dict() for verdict in output.verdicts] == [v.to_dict() for v in verdicts]
    answers = output.sequences[:, -3:].tolist()
    assert answers[0] == list(REFUSAL)
    unflagged, _ = regional_model(flagged=False)
    usual = unflagged.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answers[1] == usual[1, -3:].tolist()


@pytest.mark.parametrize(
    ("kind", "site", "part"),
    [
        ("llava", "projected", "picture"),
        ("llava_next", "projected", "picture"),
        ("llava_next", "encoder", "tile"),
        ("qwen2_vl", "projected", "picture"),
        ("blip-2", "projected", "grid"),
    ],
)
def test_the_adapter_says_what_a_grid_shows(kind: str, site: Any, part: str) -> None:
    model = build_tiny(kind)
    features = visual_features(model, site, **make_inputs(model, (1, 1), modality="image"))
    assert features.unit_parts == [part, part]


def test_an_error_of_a_policy_that_raises_says_where() -> None:
    model, inputs = regional_model(flagged=True)
    safety_map = model.vqguard.safety_map
    model.vqguard.safety_map = safety_map.with_judging(policies={"gun": Policy("raise")})
    with pytest.raises(FlaggedImageError) as caught:
        model.generate(**inputs, max_new_tokens=2)
    [reason] = caught.value.reasons
    assert isinstance(reason, Reason)
    assert reason.region is not None
    assert reason == model.screen(**inputs)[0].reason


def blanked_places(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(N,) bool of each picture: which of its tokens reach the language model as codeword 0; and
    the codes of its regions."""
    guard = model.vqguard
    safety_map = guard.safety_map
    guard.safety_map = safety_map.with_judging(policies={"gun": Policy("blank")})
    caught: list[torch.Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with recording(guard) as outputs:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    hook.remove()
    rows = caught[0][inputs["input_ids"] == model.config.image_token_id]
    tokens = torch.cat([image.detach() for image in outputs[0].tokens])
    changed = (rows != tokens).any(dim=1)
    assert bool((rows[changed] == guard.patch.codebook.weight[0]).all())
    return changed, list(outputs[0].judged.codes)


def test_blanking_takes_out_the_cells_under_flagged_regions_and_no_others() -> None:
    model, inputs = regional_model(flagged=True)
    guard = model.vqguard
    features = visual_features(model, **inputs)
    codes, *_ = guard.judged(features.semantic, None, features.tokens, features.layouts)
    counts = guard.safety_map.counts.clone()
    # of all codes that flag, one that few regions have: the others must stay
    flagging = [code for code in codes[0].tolist() if counts[code, 0]]
    rare = min(set(flagging), key=flagging.count)
    counts = torch.tensor([[int(c == rare), int(c != rare)] for c in range(guard.cells)])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("regional"))
    changed, (first, _) = blanked_places(model, inputs)
    windows = guard.regional.projection.windows
    under = windows.cells_under(((4, 4),), (first == rare).nonzero().flatten().tolist())
    assert 0 < int(under.sum()) < 16
    own = guard.judge(features.semantic, None, features.tokens, features.layouts)[0]
    region = windows.region(((4, 4),), own.token)
    assert bool(under.view(4, 4)[region.top : region.bottom, region.left : region.right].all())
    zero = torch.cat(list(guard(features.tokens, features.semantic).codes)) == 0
    assert torch.equal(changed | zero, torch.cat([under, torch.zeros(16, dtype=torch.bool)]) | zero)


def test_all_is_blanked_where_the_grid_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = regional_model(flagged=True)
    adapter = type(get_adapter(model))
    monkeypatch.setattr(adapter, "part", lambda *_: "tile")
    changed, _ = blanked_places(model, inputs)
    features = visual_features(model, **inputs)
    zero = torch.cat(list(model.vqguard(features.tokens, features.semantic).codes)) == 0
    assert bool((changed | zero)[:16].all())
    assert not bool(changed[16:].any())


def test_an_attacker_is_shown_the_regions_that_decide() -> None:
    model, inputs = regional_model(flagged=True)
    guard: VQGuard = model.vqguard
    shown: list[torch.Tensor] = []

    def record(features: torch.Tensor, words: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        shown.append(features)
        return words[codes]

    pixels = inputs["pixel_values"].clone().requires_grad_()
    with use_estimator(guard.judging, record), recording(guard) as outputs:
        model(**{**inputs, "pixel_values": pixels})
    (features,), (output,) = shown, outputs
    codes, mask, *_ = output.judged
    assert mask is None
    assert torch.equal(guard.judging.encode(features), codes)
    features.square().sum().backward()
    assert pixels.grad is not None
    assert bool((pixels.grad != 0).any())


@pytest.mark.parametrize("whole", [True, False])
def test_a_saved_model_judges_as_before(tmp_path: Path, whole: bool) -> None:
    base = build_tiny("llava")
    base.save_pretrained(tmp_path / "base")
    model, inputs = regional_model(flagged=True)
    folder = tmp_path / "guarded"
    if whole:
        model.save_pretrained(folder)
    else:
        save_guard_only(model, folder, base=tmp_path / "base")
    read = load_guarded(folder, base=None if whole else tmp_path / "base")
    before, after = (subject.screen(**inputs) for subject in (model, read))
    assert [v.to_dict() for v in after] == [v.to_dict() for v in before]
    assert read.vqguard.config.regional == model.vqguard.config.regional


def test_no_stage_trains_the_judge() -> None:
    model, _ = regional_model(flagged=False)
    adapter = get_adapter(model)
    trained = [*adapter.stage1_trainable(model), *adapter.stage2_trainable(model)]
    assert not [name for name, _ in trained if ".regional." in name]
    assert [name for name, _ in trained if ".semantic." in name]


def test_a_regional_judge_behind_an_encoder_reads_its_grid() -> None:
    def encoder(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 8).flatten(2).transpose(1, 2)

    images = torch.randn(6, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    guarded = guard_encoder(
        encoder,
        global_token="mean",
        example=images,
        patch_codes=8,
        semantic_codes=4,
        judge="regional",
        regional={**REGIONAL, "hidden": 64},
    )
    guard: VQGuard = guarded.guard
    assert guarded.semantic_codes(images).shape == (6, 2 * 4 + 1 * 3)
    labels = ["toxic", "neutral"] * 3
    made = guarded.calibrate(images, labels, tau=0.5)
    assert made.cells == guard.cells == 24
    flagged = [verdict.flagged for verdict in guarded.screen(images)]
    output = guarded(images)
    assert output.flagged is not None
    assert output.flagged.tolist() == flagged
    assert [guarded.screen(image[None])[0].flagged for image in images] == flagged
