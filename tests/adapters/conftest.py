"""A LLaVA of a few thousand random weights, built from the real classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vqguard.adapters.proof.random_models as tiny
from vqguard.adapters import build_guard, guard_model
from vqguard.adapters.features import Site
from vqguard.adapters.proof.random_models import build, conformance_table
from vqguard.adapters.registry import declared_family
from vqguard.guard import VQGuard
from vqguard.safety_map import SafetyMap

PATCHES = 16
IMAGE_TOKEN = 60
EOS, PAD = 2, 1
REFUSAL = (50, 51, 52, 53, 54)

_build = tiny.build_tiny


def _build_or_skip(kind: str, seed: int = 0, **fields: Any) -> Any:
    family = declared_family(kind)
    if not family.is_proven():
        pytest.skip(f"{kind} is proven from transformers {family.proven_from} on")
    return _build(kind, seed, **fields)


# On an older transformers some families are refused, which test_unknown.py shows. Set here, before
# the tests import it: on the newest it never skips.
PLACES: tuple[Any, ...] = (tiny, build, conformance_table)
for place in PLACES:
    place.build_tiny = _build_or_skip


@pytest.fixture
def make_llava() -> Callable[..., Any]:
    def make(**overrides: Any) -> Any:
        torch.manual_seed(0)
        vision = CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
        text = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=PAD,
            bos_token_id=0,
            eos_token_id=EOS,
        )
        fields = {"image_token_index": IMAGE_TOKEN, "image_seq_length": PATCHES, **overrides}
        config = LlavaConfig(vision_config=vision, text_config=text, **fields)
        model: Any = LlavaForConditionalGeneration(config)
        model.eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Default weights are so small that logits hardly depend on the image.
                parameter.mul_(4)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = EOS
        return model

    return make


@pytest.fixture
def make_guarded(make_llava: Callable[..., Any]) -> Callable[..., Any]:
    """A guarded tiny model whose map flags exactly the semantic codes in `flag`."""

    def make(
        flag: tuple[int, ...] = (),
        site: Site = "projected",
        model: Any = None,
        refusal_ids: tuple[int, ...] | None = REFUSAL,
        **overrides: Any,
    ) -> Any:
        model = make_llava(**overrides) if model is None else model
        guard = build_guard(model, site=site, patch_codes=24, semantic_codes=6, search="torch")
        guard.safety_map = flagging_map(guard, flag)
        return guard_model(model, guard, refusal_ids=refusal_ids)

    return make


def flagging_map(guard: VQGuard, flag: tuple[int, ...]) -> SafetyMap:
    counts = torch.zeros(guard.config.semantic_codes, 2, dtype=torch.int64)
    for code in range(len(counts)):
        counts[code, 0 if code in flag else 1] = 3
    return SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))


@pytest.fixture
def flag_codes() -> Callable[[Any, set[int]], None]:
    """Give a guarded model a map that flags these semantic codes."""

    def flag(model: Any, codes: set[int]) -> None:
        model.vqguard.safety_map = flagging_map(model.vqguard, tuple(codes))

    return flag


@pytest.fixture
def make_inputs() -> Callable[..., dict[str, Tensor]]:
    """A left-padded batch: `images[i]` images in row i, pixels drawn from `seed`."""

    def make(images: tuple[int, ...] = (1,), seed: int = 0, tokens: int = PATCHES) -> Any:
        generator = torch.Generator().manual_seed(seed)
        rows = [
            [0, *([IMAGE_TOKEN] * tokens * count), *range(5, 9 + index)]
            for index, count in enumerate(images)
        ]
        width = max(len(row) for row in rows)
        ids = [[PAD] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if sum(images):
            pixels = torch.randn(sum(images), 3, 32, 32, generator=generator)
            inputs["pixel_values"] = (
                pixels * torch.linspace(0.3, 3, sum(images))[:, None, None, None]
            )
        return inputs

    return make


@pytest.fixture
def count_calls() -> Callable[[Any], list[int]]:
    """Counts the runs of a module: the list grows by one at each."""

    def count(module: Any) -> list[int]:
        calls: list[int] = []
        module.register_forward_hook(lambda *_: calls.append(1))
        return calls

    return count
