"""Zero-shot categories from text, where the judged token is in the space that texts share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from transformers import BatchEncoding

from vqguard import guard_encoder
from vqguard.adapters.encoders.text_towers import prompt_evidence, shared_encoder, text_tower
from vqguard.errors import ConfigError, SeamError
from vqguard.judging.settings import JudgeSettings
from vqguard.safety_map import SafetyMap

BLOCKS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION: dict[str, Any] = {**BLOCKS, "image_size": 32, "patch_size": 8}
TEXT: dict[str, Any] = {**BLOCKS, "vocab_size": 64, "max_position_embeddings": 8}
PROMPTS = {"gun": ["a gun", "a rifle"], "neutral": ["a photo"]}


def tokenizer(texts: list[str], **_: Any) -> BatchEncoding:
    # the highest id ends a text: there CLIP reads what the whole of it says
    ids = [[*(3 + (ord(c) % 50) for c in f"{text:7}"[:7]), 63] for text in texts]
    return BatchEncoding({"input_ids": torch.tensor(ids)})


def make(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "clip":
        config: Any = tf.CLIPConfig(
            text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=16
        )
        return tf.CLIPModel(config).eval()
    config = tf.SiglipConfig(text_config=TEXT, vision_config=VISION)
    return tf.SiglipModel(config).eval()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_prompts_say_what_their_own_codewords_are(kind: str) -> None:
    model = make(kind)
    guarded = guard_encoder(shared_encoder(model), patch_codes=9, semantic_codes=3)
    tower = text_tower(model, tokenizer)
    pixels = torch.randn(2, 3, 32, 32)
    features: Any = model.get_image_features(pixel_values=pixels)
    images = features if isinstance(features, torch.Tensor) else features.pooler_output
    torch.testing.assert_close(guarded.features(pixels)[1][:, 0], images)
    with torch.no_grad():  # codewords that are the embeddings of the prompts
        guarded.guard.semantic.codebook.weight.copy_(
            torch.cat([tower.embed(PROMPTS["gun"]), tower.embed(PROMPTS["neutral"])])
        )
    tower = tower._replace(scale=1e5)  # random weights put all texts close together
    text = prompt_evidence(guarded, tower, PROMPTS, strength=3.0)
    safety_map = SafetyMap(
        ("gun",),
        torch.zeros(3, 2, dtype=torch.int64),
        codebook_checksum=guarded.guard.checksum("semantic"),
        judging=JudgeSettings(text=text),
    )
    assert [safety_map.category_of(cell) for cell in range(3)] == ["gun", "gun", "neutral"]
    guarded.guard.safety_map = safety_map
    assert len(guarded.screen(pixels)) == 2


def test_tokens_outside_the_shared_space_are_refused() -> None:
    model = make("clip")
    tower = text_tower(model, tokenizer)
    for guarded in (
        guard_encoder(model, patch_codes=9, semantic_codes=3),
        guard_encoder(shared_encoder(model), patch_codes=9, semantic_codes=3, global_token="mean"),
    ):
        with pytest.raises(ConfigError, match="guard shared_encoder"):
            prompt_evidence(guarded, tower, PROMPTS)


def test_a_regional_judge_takes_no_prompts() -> None:
    """Its codes are another codebook's, of as many entries here."""
    model = make("clip")
    regions: dict[str, Any] = {
        "judge": "regional",
        "regional": {"codes": 3, "width": 2, "hidden": 4},
    }
    guarded = guard_encoder(shared_encoder(model), patch_codes=9, semantic_codes=3, **regions)
    with pytest.raises(ConfigError, match=r"judges regions.*judge: global"):
        prompt_evidence(guarded, text_tower(model, tokenizer), PROMPTS)


def test_a_model_without_a_text_tower_is_refused() -> None:
    vision = tf.CLIPVisionModel(tf.CLIPVisionConfig(**VISION))
    with pytest.raises(SeamError, match="has no text tower"):
        text_tower(vision, tokenizer)
    with pytest.raises(SeamError, match="no space that images and texts share"):
        shared_encoder(vision)


def test_open_clip() -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        16,
        {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
        {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    guarded = guard_encoder(shared_encoder(model), patch_codes=9, semantic_codes=3)
    tower = text_tower(model, lambda texts: tokenizer(texts)["input_ids"])
    text = prompt_evidence(guarded, tower, PROMPTS, strength=3.0)
    assert torch.allclose(torch.tensor(text.counts).sum(dim=1), torch.full((3,), 3.0))
