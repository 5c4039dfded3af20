"""OpenCLIP's image towers, tiny and random."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard import guard_encoder
from vqguard.errors import ArtefactError, ConfigError, InputError

open_clip = pytest.importorskip("open_clip", reason="needs the extra open-clip")

TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"image_size": 32, "layers": 2, "width": 24, "patch_size": 8, "head_width": 8},
    "vit, averaged": {
        "image_size": 32,
        "layers": 2,
        "width": 24,
        "patch_size": 8,
        "head_width": 8,
        "pool_type": "avg",
    },
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "timm": {"image_size": 64, "timm_model_name": "convnext_atto", "timm_proj": "linear"},
}


def clip(kind: str) -> Any:
    torch.manual_seed(0)
    return open_clip.CLIP(embed_dim=16, vision_cfg=TOWERS[kind], text_cfg=TEXT).eval()


@pytest.mark.parametrize("kind", TOWERS)
def test_the_global_token_is_the_image_embedding(kind: str) -> None:
    model = clip(kind)
    guarded = guard_encoder(model, patch_codes=9, semantic_codes=3)
    side = TOWERS[kind]["image_size"]
    pixels = torch.randn(2, 3, side, side)
    tokens, semantic = guarded.features(pixels)
    assert torch.allclose(semantic[:, 0], model.encode_image(pixels), atol=1e-5)
    assert guarded.guard.config.semantic_dim == 16
    assert guarded.guard.config.patch_dim == tokens.shape[2]
    assert torch.equal(guard_encoder(model.visual).features(pixels)[0], tokens)
    if kind == "vit":
        model.visual.output_tokens = True
        assert torch.allclose(tokens, model.visual(pixels)[1], atol=1e-5)


def test_a_folder_with_its_config_and_weights(tmp_path: Path) -> None:
    config = {"embed_dim": 16, "vision_cfg": TOWERS["vit"], "text_cfg": TEXT}
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(described))
    model = clip("vit")
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    guarded = guard_encoder(f"open_clip:local-dir:{tmp_path}", patch_codes=9, semantic_codes=3)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.allclose(guarded.features(pixels)[1][:, 0], model.encode_image(pixels), atol=1e-5)
    assert guarded.preprocess is not None


def test_names_and_tags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory = importlib.import_module("open_clip.factory")
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    config = {"embed_dim": 16, "vision_cfg": TOWERS["vit"], "text_cfg": TEXT}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny.json")
    guarded = guard_encoder("open_clip:tiny", pretrained=False, patch_codes=9, semantic_codes=3)
    assert guarded.guard.config.semantic_dim == 16
    weights = tmp_path / "weights.pth"
    torch.save(clip("vit").state_dict(), weights)
    loaded = guard_encoder("open_clip:tiny", pretrained=weights, patch_codes=9, semantic_codes=3)
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.features(pixels)[0], guard_encoder(clip("vit")).features(pixels)[0])

    with pytest.raises(InputError, match="ViT-B-32"):
        guard_encoder("open_clip:ViT-B32")
    with pytest.raises(InputError, match="laion2b_s34b_b79k"):
        guard_encoder("open_clip:ViT-B-32")
    with pytest.raises(InputError, match="Did you mean 'laion2b_s34b_b79k'"):
        guard_encoder("open_clip:ViT-B-32", pretrained="laion2b_s34b_b79")
    with pytest.raises(ArtefactError, match="could not be had"):
        guard_encoder("open_clip:local-dir:/nowhere")


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vqguard\[open-clip\]"):
        guard_encoder("open_clip:ViT-B-32", pretrained=False)
