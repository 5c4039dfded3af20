"""GenerationTarget on a tiny random LLaVA: its loss, its gradient, its judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vqguard.adapters.attack_target import GenerationTarget, frozen_eval
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.errors import ConfigError, InputError
from vqguard.redteam import PGD, UniversalPGD

WORDS = [
    "sure",
    "here",
    "is",
    "how",
    "no",
    "tell",
    "me",
    "about",
    "red",
    "blue",
    "things",
    "now",
    "and",
]
PROMPTS = ["<image> tell me about red things now", "<image> tell me now", "<image> about blue now"]
OPENINGS = ["sure here is how", "sure", "here is how"]
SIZE = 16


def make_processor(**image_options: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", "<image>"])}
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    make_tokenizer: Any = PreTrainedTokenizerFast
    tokenizer = make_tokenizer(
        tokenizer_object=raw,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": SIZE, "width": SIZE}
    options = {"size": size, "crop_size": size, "do_center_crop": True} | image_options
    make: Any = LlavaProcessor
    return make(
        CLIPImageProcessor(**options),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def make_model() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaForConditionalGeneration(config)
    model.eval()
    with torch.no_grad():  # wide enough that images change answers
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return model


class QuantisedProjector(nn.Module):
    """The bottleneck in its place, without the rest of a guard."""

    def __init__(self, projector: nn.Module) -> None:
        super().__init__()
        self.projector = projector
        self.quantiser = VectorQuantizer(8, 32, seed=1)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.quantiser(self.projector(features)).output
        return output


def quantised_model() -> Any:
    model = make_model()
    projector = QuantisedProjector(model.model.multi_modal_projector)
    projector.eval()
    pixels = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = torch.cat(model.get_image_features(pixels).pooler_output)
        projector.quantiser.codebook.weight.copy_(tokens)
    model.model.multi_modal_projector = projector
    return model


def images(count: int = 3, seed: int = 0) -> Tensor:
    levels = torch.randint(
        0, 256, (count, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(seed)
    )
    return levels / 255.0


def as_pil(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor()


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model()


def test_the_loss_is_the_models_own_with_labels(model: Any, processor: Any) -> None:
    pixels = images()
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)
    losses = target.loss(pixels, torch.arange(3))
    for row in range(3):
        inputs = processor(
            images=as_pil(pixels[row]),
            text=PROMPTS[row] + " " + OPENINGS[row],
            return_tensors="pt",
        )
        labels = inputs["input_ids"].clone()
        labels[:, : -len(OPENINGS[row].split())] = -100
        with torch.no_grad():
            expected = model(**inputs, labels=labels).loss
        assert float(losses[row]) == pytest.approx(float(expected), rel=1e-4)


def test_a_row_does_not_depend_on_its_batch(model: Any, processor: Any) -> None:
    pixels, target = images(), GenerationTarget(model, processor, PROMPTS, OPENINGS)
    together = target.loss(pixels, torch.arange(3))
    for row in range(3):
        alone = target.loss(pixels[row : row + 1], torch.tensor([row]))
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0])
    torch.testing.assert_close(
        target.loss(pixels[order], order), together[order], rtol=1e-4, atol=1e-5
    )
    texts = target.answers(pixels, torch.arange(3))
    assert texts == [target.answers(pixels[i : i + 1], torch.tensor([i]))[0] for i in range(3)]


def test_answers_are_those_of_the_processor_and_generate(model: Any, processor: Any) -> None:
    pixels = images()
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)
    assert target.max_new_tokens == 4 + 4
    texts = target.answers(pixels, torch.arange(3))
    for row in range(3):
        inputs = processor(images=as_pil(pixels[row]), text=PROMPTS[row], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        assert texts[row] == processor.tokenizer.decode(new, skip_special_tokens=True)
    assert len(set(texts)) > 1


def test_one_opening_serves_all_prompts_and_is_judged_on_the_answer(
    model: Any, processor: Any
) -> None:
    pixels = images()
    texts = GenerationTarget(model, processor, PROMPTS, ["sure"]).answers(pixels, torch.arange(3))
    first = texts[0].split()[0]
    target = GenerationTarget(model, processor, PROMPTS, [first])
    expected = [text.split()[:1] == [first] for text in texts]
    assert target.succeeded(pixels, torch.arange(3)).tolist() == expected
    assert expected[0]


def test_success_is_judged_on_8_bit_pixels(model: Any, processor: Any) -> None:
    pixels = images()
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)
    seen: list[Tensor] = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(arguments[0]), with_kwargs=True
    )
    try:
        target.succeeded(pixels + 0.4 / 255, torch.arange(3))
        target.succeeded(pixels, torch.arange(3))
    finally:
        hook.remove()
    assert torch.equal(seen[0], seen[1])


def test_a_judge_of_the_users_own_decides(model: Any, processor: Any) -> None:
    def odd(texts: Sequence[str], requests: Sequence[int]) -> list[bool]:
        assert len(texts) == len(requests)
        return [request % 2 == 1 for request in requests]

    target = GenerationTarget(model, processor, PROMPTS, OPENINGS, odd)
    assert target.succeeded(images(2), torch.tensor([1, 2])).tolist() == [True, False]


@pytest.mark.parametrize("mode", ["plain", "straight_through", "softmax"])
def test_the_gradient_reaches_the_pixels(mode: str, processor: Any) -> None:
    guarded = quantised_model()
    target = GenerationTarget(guarded, processor, PROMPTS, OPENINGS, gradient=mode)
    pixels = images().requires_grad_()
    (gradient,) = torch.autograd.grad(target.loss(pixels, torch.arange(3)).sum(), pixels)
    assert bool((gradient.flatten(1).abs().max(dim=1).values > 0).all())
    assert all(parameter.grad is None for parameter in guarded.parameters())


def test_the_stopped_gradient_is_exactly_zero_and_the_attack_says_so(
    processor: Any,
) -> None:
    target = GenerationTarget(quantised_model(), processor, PROMPTS, OPENINGS, gradient="stopped")
    result = PGD(eps_255=16, steps=5)(target, images())
    assert torch.equal(result.adversarial, images())
    assert any("masked" in text for text in result.warnings)


@pytest.mark.parametrize("mode", ["stopped", "straight_through", "softmax"])
def test_the_loss_value_is_that_of_the_deployed_model(mode: str, processor: Any) -> None:
    guarded, pixels = quantised_model(), images()
    exact = GenerationTarget(guarded, processor, PROMPTS, OPENINGS, gradient=mode)
    removed = GenerationTarget(guarded, processor, PROMPTS, OPENINGS, gradient="plain")
    stopped = GenerationTarget(guarded, processor, PROMPTS, OPENINGS, gradient="stopped")
    rows = torch.arange(3)
    assert torch.equal(exact.loss(pixels, rows), stopped.loss(pixels, rows))
    assert not torch.allclose(exact.loss(pixels, rows), removed.loss(pixels, rows))


def test_an_attack_breaks_the_undefended_model(model: Any, processor: Any) -> None:
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)
    clean = images()
    before = target.loss(clean, torch.arange(3))
    attack = PGD(eps_255=255, steps=30, step_255=8, judge_every=10)
    result = attack(target, clean)
    assert bool((result.best_loss < before - 0.5).all())
    assert result.success.tolist() == target.succeeded(result.adversarial, torch.arange(3)).tolist()
    universal = UniversalPGD(pgd=attack, requests_per_step=2)(target, clean[0])
    assert universal.mean_loss < float(before.mean())


def test_the_model_is_frozen_inside_and_restored_after_an_error(
    processor: Any,
) -> None:
    model = make_model().train()
    model.model.vision_tower.eval()
    model.lm_head.weight.requires_grad_(False)
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)

    def fail_inside() -> None:
        with target:
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            target.loss(images(1), torch.tensor([0]))
            assert not any(module.training for module in model.modules())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail_inside()
    assert model.training
    assert not model.model.vision_tower.training
    assert not model.lm_head.weight.requires_grad
    assert model.model.vision_tower.parameters().__next__().requires_grad
    with frozen_eval(model):
        assert not model.training


def test_pixels_of_another_size_and_prompts_without_an_image_are_refused(
    model: Any, processor: Any
) -> None:
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)
    assert target.image_size == (SIZE, SIZE)
    with pytest.raises(InputError, match="resize"):
        target.loss(torch.zeros(1, 3, 8, 8), torch.tensor([0]))
    with pytest.raises(InputError, match="openings"):
        GenerationTarget(model, processor, PROMPTS, OPENINGS[:2])
    with pytest.raises(InputError, match="0 image tokens"):
        GenerationTarget(model, processor, ["tell me now"], ["sure"])
    with pytest.raises(InputError, match="no token"):
        GenerationTarget(model, processor, PROMPTS, [""], lambda texts, requests: [])


def test_a_processor_that_does_more_than_normalise_is_refused(
    model: Any,
) -> None:
    with pytest.raises(ConfigError, match="more than normalise"):
        GenerationTarget(model, make_processor(rescale_factor=1 / 127), PROMPTS, OPENINGS)
    with pytest.raises(ConfigError, match="no fixed output size"):
        GenerationTarget(
            model,
            make_processor(size={"shortest_edge": SIZE}, do_center_crop=False),
            PROMPTS,
            OPENINGS,
        )


def test_modes_and_verdicts_need_a_guard(model: Any, processor: Any) -> None:
    with pytest.raises(ConfigError, match="has none"):
        GenerationTarget(model, processor, PROMPTS, OPENINGS, gradient="straight_through")
    with pytest.raises(ConfigError, match="safety map"):
        GenerationTarget(model, processor, PROMPTS, OPENINGS, evade_verdict=True)


def test_the_differentiable_preprocessing_is_the_processors(model: Any, processor: Any) -> None:
    pixels = images(1, seed=5)
    expected = processor.image_processor(
        images=Image.fromarray((pixels[0] * 255).round().byte().permute(1, 2, 0).numpy()),
        return_tensors="pt",
    )["pixel_values"]
    target = GenerationTarget(model, processor, PROMPTS, OPENINGS)
    found = target._pixel_values(pixels)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)
