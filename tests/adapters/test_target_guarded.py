"""GenerationTarget on a guarded model: the verdict, and the gradient through the real guard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from vqguard.adapters import build_guard, get_adapter, guard_model, visual_features
from vqguard.adapters.attack_target import VERDICT_WEIGHT, GenerationTarget
from vqguard.errors import ConfigError
from vqguard.guard import VQGuard
from vqguard.redteam import PGD
from vqguard.safety_map import SafetyMap

SIZE = 32
PROMPTS = ["<image> w5 w6 w7", "<image> w8 w9", "<image> w5"]
OPENINGS = ["w11 w12 w13", "w14 w15", "w16"]


def make_processor() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {f"w{number}": number for number in range(64)}
    vocabulary["<image>"] = vocabulary.pop("w60")
    vocabulary["<pad>"] = vocabulary.pop("w1")
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make_tokenizer: Any = PreTrainedTokenizerFast
    tokenizer = make_tokenizer(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="w3",
        eos_token="w2",
        additional_special_tokens=["<image>"],
    )
    size = {"height": SIZE, "width": SIZE}
    make: Any = LlavaProcessor
    return make(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def images(count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator) / 255.0


def always(texts: Sequence[str], requests: Sequence[int]) -> list[bool]:
    return [True] * len(texts)


@pytest.fixture
def guarded(make_llava: Callable[..., Any]) -> Any:
    """Codebooks are features of images, so that cells are inhabited and differ."""
    model = make_llava()
    guard = build_guard(model, patch_codes=24, semantic_codes=6, search="torch")
    # The tests' own three images lead: whatever the model's weights, they differ in their codes.
    centres = torch.cat([images(3), images(3, seed=9)])
    values = GenerationTarget(model, make_processor(), PROMPTS, OPENINGS)._pixel_values(centres)
    with torch.no_grad():
        features = visual_features(model, "projected", pixel_values=values)
        tokens = torch.cat(list(features.tokens))
        guard.patch.codebook.weight.copy_(tokens[:: len(tokens) // 24][:24])
        guard.semantic.codebook.weight.copy_(features.semantic[:, 0])
    flag(guard, set())
    return guard_model(model, guard, refusal_ids=(50, 51))


def flag(guard: VQGuard, codes: set[int]) -> None:
    """Give the guard a map that flags exactly these semantic codes."""
    counts = torch.tensor([[1, 0] if code in codes else [0, 1] for code in range(6)])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))


def codes_of(model: Any, target: GenerationTarget, pixels: Tensor) -> list[int]:
    return [v.semantic_code for v in model.screen(pixel_values=target._pixel_values(pixels))]


@pytest.mark.parametrize("mode", ["plain", "straight_through", "softmax"])
def test_the_gradient_reaches_the_pixels_through_the_guard(mode: str, guarded: Any) -> None:
    target = GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, gradient=mode)
    pixels = images().requires_grad_()
    (gradient,) = torch.autograd.grad(target.loss(pixels, torch.arange(3)).sum(), pixels)
    assert bool((gradient.flatten(1).abs().max(dim=1).values > 0).all())


def test_the_stopped_gradient_is_exactly_zero(guarded: Any) -> None:
    target = GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, gradient="stopped")
    with target:
        loss = target.loss(images().requires_grad_(), torch.arange(3))
        assert not loss.requires_grad
    result = PGD(eps_255=16, steps=20, restarts=2)(target, images())
    assert any("masked" in text for text in result.warnings)


def test_a_flagged_image_never_succeeds(guarded: Any) -> None:
    pixels, rows = images(), torch.arange(3)
    target = GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, always)
    assert target.succeeded(pixels, rows).all()
    codes = codes_of(guarded, target, pixels)
    flag(guarded.vqguard, {codes[0]})
    expected = [code != codes[0] for code in codes]
    assert target.succeeded(pixels, rows).tolist() == expected
    assert target.refused(pixels).tolist() == [not fine for fine in expected]
    flag(guarded.vqguard, set(codes))
    assert not target.succeeded(pixels, rows).any()


@pytest.mark.parametrize("mode", ["stopped", "straight_through"])
def test_evading_the_verdict_moves_the_image_out_of_flagged_cells(mode: str, guarded: Any) -> None:
    # Beside the pictures that the codewords are features of: at a codeword the hinge is flat, and
    # only rounding shows a way down.
    noise = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    pixels, rows = (images() + 4 / 255 * noise).clamp(0, 1), torch.arange(3)
    blind = GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, always, gradient=mode)
    codes = codes_of(guarded, blind, pixels)
    flag(guarded.vqguard, set(codes))
    aware = GenerationTarget(
        guarded,
        make_processor(),
        PROMPTS,
        OPENINGS,
        always,
        gradient=mode,
        evade_verdict=True,
    )
    # the hinge is positive for a flagged image, and the encoder ran once for both terms
    calls: list[int] = []
    hook = guarded.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    extra = aware.loss(pixels, rows) - blind.loss(pixels, rows)
    hook.remove()
    assert len(calls) == 2
    assert bool((extra > 0).all())
    result = PGD(eps_255=255, steps=40, step_255=4, judge_every=10)(aware, pixels)
    assert result.success.any()
    assert not aware.refused(result.adversarial)[result.success].any()


def test_each_image_has_its_own_verdict_term(guarded: Any) -> None:
    pixels, rows = images(), torch.arange(3)
    blind = GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS)
    codes = codes_of(guarded, blind, pixels)
    assert len(set(codes)) > 1
    for flagged in set(codes):
        flag(guarded.vqguard, {flagged})
        aware = GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, evade_verdict=True)
        term = (aware.loss(pixels, rows) - blind.loss(pixels, rows)) / VERDICT_WEIGHT
        # above the hinge's margin of 0.02 exactly where the code is flagged
        assert (term > 0.02).tolist() == [code == flagged for code in codes]


def test_evading_is_refused_where_nothing_can_be_evaded(guarded: Any) -> None:
    flag(guarded.vqguard, set(range(6)))
    with pytest.raises(ConfigError, match="every semantic cell"):
        GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, evade_verdict=True)
    guarded.vqguard.safety_map = None
    with pytest.raises(ConfigError, match="safety map"):
        GenerationTarget(guarded, make_processor(), PROMPTS, OPENINGS, evade_verdict=True)


@pytest.mark.parametrize("mode", ["stopped", "straight_through"])
def test_an_image_s_hinge_is_the_same_beside_images_with_more_tokens(
    mode: str, guarded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of a batch has one semantic token, the others have two."""
    adapter = type(get_adapter(guarded))
    usual = adapter.global_token
    shown_first: list[bool] = []

    def global_token(self: Any, shown: Any) -> list[Tensor]:
        rows = usual(self, shown)
        more = [torch.cat([row, unit[:1]]) for row, unit in zip(rows, shown.units, strict=True)]
        return [rows[0], *more[1:]] if shown_first else more

    monkeypatch.setattr(adapter, "global_token", global_token)
    pixels, rows = images(), torch.arange(3)
    flag(guarded.vqguard, set(range(5)))
    target = GenerationTarget(
        guarded,
        make_processor(),
        PROMPTS,
        OPENINGS,
        always,
        gradient=mode,
        evade_verdict=True,
    )
    others = target.loss(pixels, rows)[1:]
    shown_first.append(True)
    together = target.loss(pixels, rows)
    alone = target.loss(pixels[:1], rows[:1])
    torch.testing.assert_close(together, torch.cat([alone, others]))
