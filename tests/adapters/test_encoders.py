"""`guard_encoder` with transformers' vision models and with any callable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from torch import Tensor, nn

from vqguard import GuardConfig, VQGuard, guard_encoder, straight_through
from vqguard.errors import ArtefactError, ConfigError, InputError, NonFiniteError, SeamError

BLOCKS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VIT: dict[str, Any] = {**BLOCKS, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
SIZES: dict[str, Any] = {"patch_codes": 9, "semantic_codes": 3}

# class, config, tokens before the grid, tokens of the grid
MODELS: dict[str, tuple[Any, Any, int, int]] = {
    "vit": (tf.ViTModel, tf.ViTConfig(**VIT), 1, 16),
    "deit": (tf.DeiTModel, tf.DeiTConfig(**VIT), 2, 16),
    "clip": (tf.CLIPVisionModel, tf.CLIPVisionConfig(**VIT), 1, 16),
    "siglip": (tf.SiglipVisionModel, tf.SiglipVisionConfig(**VIT), 0, 16),
    "ijepa": (tf.IJepaModel, tf.IJepaConfig(**VIT), 0, 16),
    "beit": (tf.BeitModel, tf.BeitConfig(**VIT), 1, 16),
    "dinov2": (
        tf.Dinov2WithRegistersModel,
        tf.Dinov2WithRegistersConfig(**BLOCKS, image_size=30, patch_size=7, num_register_tokens=3),
        4,
        16,
    ),
    "swin": (
        tf.SwinModel,
        tf.SwinConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        ),
        0,
        64,
    ),
    "convnext": (
        tf.ConvNextModel,
        tf.ConvNextConfig(hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], image_size=96),
        0,
        9,
    ),
    "resnet": (
        tf.ResNetModel,
        tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1]),
        0,
        49,
    ),
    "timm": (
        tf.TimmWrapperModel,
        tf.TimmWrapperConfig(architecture="resnet18", model_args={"layers": (1, 1, 1, 1)}),
        0,
        49,
    ),
}


def make(kind: str) -> Any:
    torch.manual_seed(0)
    cls, config = MODELS[kind][:2]
    return cls(config).eval()


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_vision_models(kind: str) -> None:
    prefix, grid = MODELS[kind][2:]
    model = make(kind)
    guarded = guard_encoder(model, **SIZES)
    encoder: Any = guarded.encoder
    pixels = torch.randn(2, *encoder.input_shape, requires_grad=True)
    found = model(pixel_values=pixels)
    tokens, semantic = guarded.features(pixels)
    hidden = found.last_hidden_state
    if hidden.dim() == 4:
        hidden = hidden.flatten(2).transpose(1, 2)
    assert torch.equal(tokens, hidden[:, prefix:])
    assert tokens.shape[1] == grid
    pooled = getattr(found, "pooler_output", None)
    wanted = tokens.mean(1) if pooled is None else pooled.flatten(1)
    assert torch.allclose(semantic[:, 0], wanted, atol=1e-6)
    with straight_through(guarded):
        guarded(pixels).tokens.square().sum().backward()
    assert pixels.grad is not None
    assert bool((pixels.grad.flatten(1).abs().sum(1) > 0).all())


def test_a_two_tower_model_gives_its_vision_side() -> None:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    model: Any = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=VIT)).eval()
    pixels = torch.randn(2, 3, 32, 32)
    semantic = guard_encoder(model, **SIZES).features(pixels)[1]
    assert torch.equal(semantic[:, 0], model.vision_model(pixel_values=pixels).pooler_output)


def test_language_models_are_sent_to_guard_model(make_llava: Any) -> None:
    with pytest.raises(SeamError, match="guard_model"):
        guard_encoder(make_llava())


def test_a_local_checkpoint_by_name(tmp_path: Path) -> None:
    model = make("siglip")
    model.save_pretrained(tmp_path)
    processor = tf.SiglipImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    guarded = guard_encoder(f"transformers:{tmp_path}", **SIZES)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8))
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
    assert guarded.preprocess is not None
    assert torch.equal(guarded.preprocess(photo), pixels[0])
    pooled = model(pixel_values=pixels).pooler_output
    assert torch.allclose(guarded.features(pixels)[1][:, 0], pooled, atol=1e-6)
    with pytest.raises(ArtefactError, match="from its config"):
        guard_encoder(f"transformers:{tmp_path}", pretrained=False)
    with pytest.raises(ConfigError, match="leave pretrained out"):
        guard_encoder(f"transformers:{tmp_path}", pretrained=tmp_path / "x")


def test_a_pooling_layer_without_weights_is_not_judged_by(tmp_path: Path) -> None:
    # as in the checkpoints of ViT classifiers: the pooler would be random
    bare = tf.ViTModel(tf.ViTConfig(**VIT), add_pooling_layer=False).eval()
    bare.save_pretrained(tmp_path)
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    guarded = guard_encoder(f"transformers:{tmp_path}", **SIZES)
    pixels = torch.randn(2, 3, 32, 32)
    cls = bare(pixel_values=pixels).last_hidden_state[:, :1]
    assert torch.allclose(guarded.features(pixels)[1], cls, atol=1e-6)


def test_a_checkpoint_with_a_hole_is_refused(tmp_path: Path) -> None:
    model = make("vit")
    state = {k: v for k, v in model.state_dict().items() if "layernorm.weight" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    tf.ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match=r"layernorm\.weight"):
        guard_encoder(f"transformers:{tmp_path}", **SIZES)
    with pytest.raises(ArtefactError, match="cannot be loaded"):
        guard_encoder(f"transformers:{tmp_path / 'none'}", **SIZES)


class Tokens(nn.Module):
    """Five tokens of width 6 of (B, 3, 4, 4) pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 30)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.linear(pixels.flatten(1))
        return out.view(-1, 5, 6)


def test_any_callable_is_measured() -> None:
    encoder, example = Tokens().double(), torch.randn(2, 3, 4, 4)
    guarded = guard_encoder(encoder, global_token="cls", example=example, **SIZES)
    assert guarded.guard.config.patch_dim == 6
    assert guarded.guard.config.site == "encoder"
    assert not guarded.training
    assert guarded.semantic_codes(example).shape == (2, 1)
    function = guard_encoder(lambda pixels: pixels.flatten(2), global_token="mean", example=example)
    assert function.guard.config.patch_dim == 16


@pytest.mark.parametrize(
    ("encoder", "options", "error", "message"),
    [
        (Tokens(), {}, ConfigError, "whether token 0"),
        (Tokens(), {"global_token": "mean"}, InputError, "example="),
        (Tokens(), {"global_token": "last"}, ConfigError, "'last'"),
        (Tokens(), {"pretrained": True}, ConfigError, "for names"),
        (3, {}, InputError, "got int"),
        ("resnet18", {}, InputError, "timm:NAME"),
        ("tim:resnet18", {}, InputError, "Did you mean 'timm'"),
    ],
)
def test_what_is_missing_is_asked_for(
    encoder: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        guard_encoder(encoder, **options)


def test_examples_that_prove_nothing_are_refused() -> None:
    pixels = torch.randn(4, 3, 4, 4)
    with pytest.raises(InputError, match="two images"):
        guard_encoder(Tokens(), global_token="mean", example=pixels[:1])
    with pytest.raises(SeamError, match=r"visual tokens \(5, 4, 6\)"):  # the batch comes second
        guard_encoder(lambda x: torch.zeros(5, 4, 6), global_token="mean", example=pixels)
    with pytest.raises(NonFiniteError, match="visual"):
        guard_encoder(lambda x: x.flatten(2) / 0, global_token="mean", example=pixels)


def test_a_guard_that_exists_must_fit() -> None:
    guard = VQGuard(GuardConfig(6, 6, **SIZES))
    options: dict[str, Any] = {"global_token": "mean", "example": torch.randn(2, 3, 4, 4)}
    assert guard_encoder(Tokens(), guard=guard, **options).guard is guard
    with pytest.raises(ConfigError, match="has its sizes"):
        guard_encoder(Tokens(), guard=guard, patch_codes=3, **options)
    with pytest.raises(SeamError, match="widths 7 and 6"):
        guard_encoder(Tokens(), guard=VQGuard(GuardConfig(7, 6, **SIZES)), **options)
