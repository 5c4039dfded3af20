"""`guard_encoder`: a guard behind any vision encoder, by name or as an object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vqguard.adapters.encoders.open_clip import as_open_clip, is_open_clip, make_open_clip
from vqguard.adapters.encoders.timm import TimmEncoder, is_timm, make_timm
from vqguard.adapters.encoders.transformers import (
    as_transformers,
    is_transformers,
    make_transformers,
)
from vqguard.config import GuardConfig
from vqguard.encoder import (
    GlobalToken,
    GuardedEncoder,
    TokenEncoder,
    check_choice,
    read_features,
)
from vqguard.errors import ConfigError, InputError, NonFiniteError, SeamError
from vqguard.guard import VQGuard
from vqguard.images import check_plain, open_image
from vqguard.names import nearest

FAMILIES = ("timm", "open_clip", "transformers")
_EXAMPLES = 3  # a number of images that tells a batch axis from most others


def guard_encoder(
    encoder: str | Callable[..., Any],
    *,
    pretrained: bool | str | Path | None = None,
    guard: VQGuard | None = None,
    global_token: GlobalToken | None = None,
    preprocess: Callable[[Any], Tensor] | None = None,
    example: Tensor | None = None,
    **sizes: Any,
) -> GuardedEncoder:
    """Put a guard behind a vision encoder. Widths are found by running it once.

    Args:
        encoder: "timm:NAME", "open_clip:NAME" or "transformers:FOLDER" (or
            "transformers:hub:owner/name"); or an object: a model of timm, open_clip or
            transformers, or any callable that returns tokens as `GuardedEncoder` takes them.
            Objects are neither copied nor changed, but for eval mode.
        pretrained: for names only. True (the default): the library's own weights; a path: a file of
            weights, nothing in it is executed; for open_clip a tag as well; False: random weights,
            good for tests alone.
        guard: one that exists; None makes one. Its entries are random until `start_codebooks`.
        global_token: what is judged instead of the encoder's own global features: "cls", "mean" or
            a callable. Needed for a callable, which does not say.
        preprocess: one PIL image -> pixels (C, H, W). None: the library's own transform.
        example: pixels (B, C, H, W), B > 1, to run it on. Needed for a callable.
        sizes: fields of `GuardConfig`, such as `patch_codes=512, semantic_codes=32, seed=1`.

    Returns:
        The guarded encoder in eval mode, with site "encoder".

    Raises:
        InputError: an unknown name, or an example that is missing.
        SeamError: an encoder whose tokens cannot be told, or a guard of other widths.
        ArtefactError: weights that cannot be had.
        ConfigError: sizes that do not exist, or a choice that is missing or has no effect.
    """
    read = _found(encoder, pretrained)
    check_choice(read, None, global_token)
    if isinstance(read, nn.Module):
        read.eval()
    width, semantic_width = _widths(read, global_token, _example(read, example))
    if guard is None:
        wanted = {"patch_dim": width, "semantic_dim": semantic_width, "site": "encoder", **sizes}
        guard = VQGuard(GuardConfig.from_dict(wanted))
    elif sizes:
        raise ConfigError(f"{', '.join(sorted(sizes))}: the guard that was given has its sizes")
    config = guard.config
    if (config.patch_dim, config.semantic_dim) != (width, semantic_width):
        raise SeamError(
            f"the guard is made for widths {config.patch_dim} and {config.semantic_dim} (visual, "
            f"semantic), the encoder has {width} and {semantic_width}"
        )
    own = read.preprocess if isinstance(read, TokenEncoder) else None
    transform = preprocess if preprocess is not None else own
    return GuardedEncoder(
        read,
        guard,
        global_token=global_token,
        preprocess=None if transform is None else RgbOnly(transform),
    ).eval()


class RgbOnly:
    """`transform` behind a check: it is given RGB pictures only.

    A path is opened with the limits of `vqguard.images.open_image`.

    Raises:
        ImageError: as that does.
        InputError: for a picture that could be read in more than one way (`check_plain`).
    """

    def __init__(self, transform: Callable[[Any], Tensor]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        if isinstance(image, str | Path):
            image = open_image(image)
        if isinstance(image, Image.Image):
            check_plain(image)
        return self.transform(image)


def _found(encoder: str | Callable[..., Any], pretrained: bool | str | Path | None) -> Any:
    if isinstance(encoder, str):
        return _by_name(encoder, True if pretrained is None else pretrained)
    if pretrained is not None:
        raise ConfigError("pretrained= is for names: an encoder object has its weights")
    if isinstance(encoder, TokenEncoder) or not isinstance(encoder, nn.Module):
        if not callable(encoder):
            raise InputError(f"expected an encoder or its name, got {type(encoder).__name__}")
        return encoder
    if is_open_clip(encoder):
        return as_open_clip(encoder)
    if is_transformers(encoder):
        return as_transformers(encoder)
    if is_timm(encoder):
        return TimmEncoder(encoder)
    return encoder


def _by_name(name: str, pretrained: bool | str | Path) -> TokenEncoder:
    family, separator, rest = name.partition(":")
    if not separator or not rest or family not in FAMILIES:
        hint = nearest(family, FAMILIES) if separator else ""
        raise InputError(
            f"{name!r} names no encoder: expected "
            f"{', '.join(f'{known}:NAME' for known in FAMILIES)}.{hint}"
        )
    if family == "timm":
        return make_timm(rest, pretrained)
    if family == "open_clip":
        return make_open_clip(rest, pretrained)
    if not isinstance(pretrained, bool):
        raise ConfigError("transformers:FOLDER names a local checkpoint; leave pretrained out")
    return make_transformers(rest, pretrained)


def _example(encoder: Callable[..., Any], example: Tensor | None) -> Tensor:
    shape = encoder.input_shape if isinstance(encoder, TokenEncoder) else None
    if example is None:
        if shape is None:
            raise InputError(
                "the encoder does not say what it takes: give example=, pixels (images, channels, "
                "height, width) of at least two images"
            )
        example = torch.randn(_EXAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    elif example.dim() < 2 or len(example) < 2:
        raise InputError(
            f"expected example pixels of at least two images, got {tuple(example.shape)}"
        )
    weight = next(encoder.parameters(), None) if isinstance(encoder, nn.Module) else None
    return example if weight is None else example.to(weight.device, weight.dtype)


@torch.no_grad()
def _widths(
    encoder: Callable[..., Any], global_token: GlobalToken | None, example: Tensor
) -> tuple[int, int]:
    """Widths (d, d_s) of the encoder's tokens; what cannot be guarded is refused here."""
    tokens, semantic = read_features(encoder(example), None, global_token)
    for what, features in (("visual", tokens), ("semantic", semantic)):
        if features.dim() != 3 or len(features) != len(example) or not features.shape[1]:
            raise SeamError(
                f"{len(example)} images gave {what} tokens {tuple(features.shape)}, expected "
                f"({len(example)}, tokens, width); give a callable that returns them so"
            )
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteError(f"the encoder's {what} tokens hold NaN or infinity")
    return tokens.shape[-1], semantic.shape[-1]
