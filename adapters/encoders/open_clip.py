"""OpenCLIP's image towers as encoders. Needs the extra `open-clip`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vqguard.adapters.encoders.token_layout import flatten_map
from vqguard.encoder import EncoderFeatures, TokenEncoder
from vqguard.errors import ArtefactError, ConfigError, InputError, SeamError
from vqguard.names import nearest


class OpenClipEncoder(TokenEncoder):
    """The image tower of an OpenCLIP model: ViT, ModifiedResNet or a timm trunk.

    Visual tokens are the last block's, normalised as the tower normalises them; the global token is
    the image embedding that is compared with texts, not scaled to length 1.
    """

    shares_text = True

    def __init__(self, tower: nn.Module) -> None:
        """`tower`: `model.visual`.

        Raises:
            SeamError: without forward_intermediates.
        """
        super().__init__()
        if not hasattr(tower, "forward_intermediates"):
            raise SeamError(
                f"{type(tower).__name__} has no forward_intermediates: expected the `visual` part "
                "of a model of open_clip 3"
            )
        self.tower = tower
        size: Any = getattr(tower, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        self.input_shape = (3, int(height), int(width))
        described = getattr(tower, "preprocess_cfg", None)
        self.preprocess = _transform(described) if described else None

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        """Pixels (B, 3, H, W) -> features."""
        tower: Any = self.tower
        # the one format that every tower has
        output = tower.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NCHW"
        )
        grid, semantic = output["image_intermediates"][-1], output["image_features"]
        tokens = flatten_map(grid, grid.shape[1], channels_last=False)
        return EncoderFeatures(tokens, semantic[:, None], tokens[:, :0])


def make_open_clip(name: str, pretrained: bool | str | Path) -> OpenClipEncoder:
    """OpenCLIP's model `name`: weights by tag or file, or random. Its text tower is dropped.

    Checkpoints are read with weights_only=True.

    Raises:
        ConfigError: without open_clip.
        InputError: for an unknown name or tag.
        ArtefactError: for weights that cannot be had.
    """
    open_clip = _library()
    by_name = not name.startswith(("hf-hub:", "local-dir:"))
    if by_name:
        _check_name(name, pretrained)
    weights = None if isinstance(pretrained, bool) else str(pretrained)
    try:
        model = open_clip.create_model(
            name,
            pretrained=weights,
            load_weights=pretrained is not False,
            require_pretrained=pretrained is not False,
            pretrained_text=False,
            weights_only=True,
        )
    except Exception as error:  # whatever the hub's client or the checkpoint raises
        raise ArtefactError(
            f"open_clip's {name!r} with pretrained={pretrained!r} could not be had "
            f"({type(error).__name__}: {error}); give a file with pretrained=PATH"
        ) from error
    return OpenClipEncoder(model.visual)


def is_open_clip(model: object) -> bool:
    """Whether this is a model or an image tower of open_clip."""
    return type(model).__module__.split(".")[0] == "open_clip"


def as_open_clip(model: nn.Module) -> OpenClipEncoder:
    """A whole model of open_clip, or its image tower. Not copied."""
    visual = getattr(model, "visual", model)
    return OpenClipEncoder(visual)


def _check_name(name: str, pretrained: bool | str | Path) -> None:
    open_clip = _library()
    if name not in open_clip.list_models():
        raise InputError(
            f"open_clip has no model {name!r}.{nearest(name, open_clip.list_models())}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is True:
        raise InputError(
            f"open_clip names weights by tag: pretrained= one of {', '.join(tags) or 'none'}, or a "
            "file"
        )
    if isinstance(pretrained, str) and pretrained not in tags and not Path(pretrained).is_file():
        raise InputError(f"{name} has no weights {pretrained!r}.{nearest(pretrained, tags)}")


def _transform(described: Any) -> Any:
    transform = _library().transform
    return transform.image_transform_v2(transform.PreprocessCfg(**described), is_train=False)


def _library() -> Any:
    if importlib.util.find_spec("open_clip") is None:
        raise ConfigError("open_clip is not installed; install vqguard[open-clip]")
    import open_clip  # an extra, which only its own encoders need

    return open_clip
