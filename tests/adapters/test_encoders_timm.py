"""timm's models: visual tokens as timm itself splits them, the global token it classifies by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from torch import Tensor, nn

from vqguard import TokenEncoder, guard_encoder, straight_through
from vqguard.adapters.encoders.timm import TimmEncoder
from vqguard.errors import ArtefactError, ConfigError, InputError, SeamError

# convolutions take any size: a small one keeps this quick
SMALL: dict[str, Any] = {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}}
SMALL_VIT: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
# name, changes that make it small, global features' width if it is not the tokens'
MODELS: list[tuple[str, dict[str, Any], int | None]] = [
    ("vit_tiny_patch16_224", {**SMALL_VIT, "img_size": 64}, None),
    ("vit_base_patch16_siglip_224", {**SMALL_VIT, "img_size": 64}, None),
    ("deit_tiny_distilled_patch16_224", {**SMALL_VIT, "img_size": 64}, None),
    ("vit_small_patch14_reg4_dinov2", {**SMALL_VIT, "img_size": 56}, None),
    ("vit_tiny_patch16_224", {**SMALL_VIT, "img_size": (48, 96)}, None),
    ("eva02_tiny_patch14_224", {**SMALL_VIT, "img_size": 56}, None),
    ("convnext_atto", {**SMALL, "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, None),
    ("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}, None),
    ("resnet18", {**SMALL, "layers": (1, 1, 1, 1)}, None),
    ("tf_efficientnet_lite0", SMALL, None),
    ("mobilenetv4_conv_small_050", SMALL, 1280),
]


def small(name: str, changes: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **changes).eval()


@pytest.mark.parametrize(("name", "changes", "wide"), MODELS, ids=[m[0] for m in MODELS])
def test_tokens_and_global_features_are_timms_own(
    name: str, changes: dict[str, Any], wide: int | None
) -> None:
    model = small(name, changes)
    guarded = guard_encoder(model, patch_codes=12, semantic_codes=4)
    assert isinstance(guarded.encoder, TokenEncoder)
    assert guarded.encoder.input_shape is not None
    pixels = torch.randn(2, *guarded.encoder.input_shape, requires_grad=True)
    tokens, semantic = guarded.features(pixels)
    (grid,) = model.forward_intermediates(
        pixels, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    if name not in ("mobilenetv4_conv_small_050", "tf_efficientnet_lite0"):  # a head follows there
        assert torch.allclose(tokens, grid.flatten(2).transpose(1, 2), atol=1e-5)
    assert tokens.shape[1] == grid.shape[2] * grid.shape[3]
    model.reset_classifier(0)
    assert torch.allclose(semantic[:, 0], model(pixels), atol=1e-5)
    assert (guarded.guard.config.patch_dim, guarded.guard.config.semantic_dim) == (
        tokens.shape[2],
        wide or tokens.shape[2],
    )

    out = guarded(pixels)
    assert torch.equal(out.tokens, guarded.guard.patch.codebook.weight[out.codes])
    assert not out.tokens.requires_grad
    with straight_through(guarded):
        out = guarded(pixels)
        (out.tokens.square().sum() + out.semantic_tokens.square().sum()).backward()
    assert pixels.grad is not None
    assert bool((pixels.grad.flatten(1).abs().sum(1) > 0).all())


def test_a_name_and_its_transform() -> None:
    guarded = guard_encoder("timm:convnext_atto", pretrained=False, patch_codes=9, semantic_codes=3)
    photo = Image.fromarray(np.full((80, 120, 3), 200, dtype=np.uint8))
    assert guarded.preprocess is not None
    pixels = guarded.preprocess(photo)
    data = resolve_model_data_config(timm.create_model("convnext_atto"))
    assert tuple(pixels.shape) == data["input_size"]
    value = (200 / 255 - data["mean"][0]) / data["std"][0]
    assert torch.allclose(pixels[0], torch.tensor(value, dtype=torch.float32), atol=1e-5)
    assert guarded.semantic_codes([photo, photo]).shape == (2, 1)
    with pytest.raises(InputError, match="mode 'RGBA'"):
        guarded.preprocess(photo.convert("RGBA"))


def test_a_class_token_that_is_not_declared_is_found() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dims": [24] * 4, "num_heads": [2] * 4, "layers": [1] * 4}
    model = timm.models.volo.VOLO(img_size=64, **sizes).eval()
    assert not hasattr(model, "num_prefix_tokens")
    pixels = torch.randn(2, 3, 64, 64)
    found = model.forward_features(pixels)
    options: dict[str, Any] = {"patch_codes": 9, "semantic_codes": 3}
    guarded = guard_encoder(TimmEncoder(model), example=pixels, **options)
    assert torch.equal(guarded.features(pixels)[0], found[:, 1:])
    assert found.shape[1] == 17


def test_another_global_token_can_be_chosen() -> None:
    model = small("eva02_tiny_patch14_224", {**SMALL_VIT, "img_size": 56})
    pixels = torch.randn(2, 3, 56, 56)
    found = model.forward_features(pixels)
    sizes: dict[str, Any] = {"patch_codes": 9, "semantic_codes": 3}
    own, cls, mean, largest = (
        guard_encoder(model, global_token=choice, **sizes).features(pixels)
        for choice in (None, "cls", "mean", lambda tokens: tokens.amax(1))
    )
    assert torch.equal(cls[1], found[:, :1])
    assert torch.allclose(mean[1][:, 0], found[:, 1:].mean(1), atol=1e-6)
    assert torch.equal(largest[1][:, 0], found[:, 1:].amax(1))
    assert not torch.allclose(own[1], cls[1])
    assert all(torch.equal(one[0], own[0]) for one in (cls, mean, largest))
    siglip = small("vit_base_patch16_siglip_224", {**SMALL_VIT, "img_size": 64})
    with pytest.raises(InputError, match="no class token"):
        guard_encoder(siglip, global_token="cls", **sizes)


def test_what_has_no_tokens_is_refused() -> None:
    with pytest.raises(SeamError, match="returns list"):
        guard_encoder(timm.create_model("crossvit_9_240"))
    model = timm.create_model("resnet18", global_pool="", **SMALL)
    with pytest.raises(SeamError, match="no pooling"):
        guard_encoder(model)

    class Headless(nn.Module):
        num_features, forward_features, forward_head = 3, None, None

        def forward(self, pixels: Tensor) -> Tensor:
            return pixels

    broken: Any = Headless()
    broken.forward_features = lambda pixels: (pixels,)
    with pytest.raises(SeamError, match="returns tuple"):
        guard_encoder(broken)


def test_names_and_weights_that_do_not_exist(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="vit_base_patch16_siglip_224"):
        guard_encoder("timm:vit_base_patch16_siglp_224")
    with pytest.raises(ArtefactError, match="no such file"):
        guard_encoder("timm:convnext_atto", pretrained=tmp_path / "none.pth")
    # no hub is reachable in tests: the library's own weights cannot be had
    with pytest.raises(ArtefactError, match="pretrained=PATH"):
        guard_encoder("timm:convnext_atto")
    with pytest.raises(ConfigError, match="patch_code"):
        guard_encoder("timm:convnext_atto", pretrained=False, patch_code=3)


def test_own_weights_are_refused_where_timm_would_execute_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def old_load(path: str, weights_only: bool = False) -> None:
        raise AssertionError("must not be called")

    monkeypatch.setattr("vqguard.adapters.encoders.timm.load_state_dict", old_load)
    with pytest.raises(ArtefactError, match="executes pickles"):
        guard_encoder("timm:convnext_atto")
