"""Public checkpoints that differ from their family's usual make: all checks, at both sites."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqguard.adapters import get_adapter
from vqguard.adapters.proof.conformance import check
from vqguard.adapters.proof.random_models import build_tiny, make_inputs

T5 = {
    "model_type": "t5",
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": 128,
    "decoder_start_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "BLIP-2 with Flan-T5": ("blip-2", {"text_config": T5}),
    "InstructBLIP with Flan-T5": ("instructblip", {"text_config": T5}),
    "LLaVA with SigLIP": (
        "llava",
        {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"},
    ),
    "LLaVA of two layers": ("llava", {"vision_feature_layer": [-2, -1]}),
    "Idefics with a resampler": ("idefics", {"use_resampler": True}),
}
FEW = ("BLIP-2 with Flan-T5",)
T5_KNOWN = pytest.mark.transformers_from("5.24", why="an encoder-decoder by its config alone")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=T5_KNOWN if v in FEW else pytest.mark.slow) for v in VARIANTS],
)
def test_variants_pass_every_check(variant: str) -> None:
    kind, fields = VARIANTS[variant]
    model = build_tiny(kind, **fields)
    inputs = make_inputs(model, (1, 2))
    if fields.get("text_config") is T5:  # transformers shifts no labels where there are none
        inputs["decoder_input_ids"] = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.int64)
    for site in get_adapter(model).sites:
        found = check(model, inputs, site=site)
        assert found.passed, str(found)
