"""timm's image models as encoders: their features, their own global features, their transform."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import timm
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import load_state_dict
from torch import Tensor, nn

from vqguard.adapters.encoders.efficientnet_names import is_foreign, timm_names
from vqguard.adapters.encoders.token_layout import flatten_map, prefix_count
from vqguard.adapters.encoders.weights import load_weights, read_state_dict
from vqguard.encoder import EncoderFeatures, TokenEncoder
from vqguard.errors import ArtefactError, InputError, SeamError
from vqguard.names import nearest_names


class TimmEncoder(TokenEncoder):
    """A timm model up to its head.

    Visual tokens are `forward_features` without class and register tokens; the global token is what
    the model itself would classify by, `forward_head(pre_logits=True)`: the class token of a ViT,
    the attention pool of SigLIP, the average of a ConvNeXt or EfficientNet. `preprocess` is the
    model's own evaluation transform.
    """

    def __init__(self, model: nn.Module) -> None:
        """`model`: any timm model with forward_features and forward_head. Else `SeamError`."""
        super().__init__()
        missing = [
            name for name in ("forward_features", "forward_head") if not hasattr(model, name)
        ]
        if missing:
            raise SeamError(
                f"{type(model).__name__} has no {' and no '.join(missing)}, so it is no timm model "
                "with features of its own; give a callable that returns tokens"
            )
        self.model = model
        data = resolve_model_data_config(model)
        data["input_size"] = (data["input_size"][0], *_size(model, data["input_size"][1:]))
        self.preprocess = create_transform(**data, is_training=False)
        self.input_shape = tuple(data["input_size"])
        self._channels_last = {"NHWC": True, "NCHW": False}.get(getattr(model, "output_fmt", ""))

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        """Pixels (B, C, H, W) -> features.

        Raises:
            SeamError: for a layout that cannot be told.
        """
        model: Any = self.model
        states = model.forward_features(pixels)
        if not isinstance(states, Tensor) or states.dim() not in (3, 4):
            shape = tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise SeamError(
                f"forward_features of {type(model).__name__} returns {shape}, not tokens or a "
                "feature map; give a callable that returns tokens"
            )
        semantic = model.forward_head(states, pre_logits=True)
        if semantic.dim() != 2:
            raise SeamError(
                f"{type(model).__name__} has no pooling (its head gives {tuple(semantic.shape)}); "
                "make it with its usual global_pool, or choose global_token"
            )
        if states.dim() == 4:
            tokens = flatten_map(states, model.num_features, self._channels_last)
            return EncoderFeatures(tokens, semantic[:, None], tokens[:, :0])
        prefix = self._prefix(states.shape[1], (pixels.shape[-2], pixels.shape[-1]))
        return EncoderFeatures(states[:, prefix:], semantic[:, None], states[:, :prefix])

    def _prefix(self, tokens: int, size: tuple[int, int]) -> int:
        declared = getattr(self.model, "num_prefix_tokens", None)
        return prefix_count(tokens, size) if declared is None else int(declared)


def make_timm(name: str, pretrained: bool | str | Path) -> TimmEncoder:
    """The model `name` of timm, pretrained (True: timm's own weights), from a file, or random.

    Weight files are those of the whole model with its classifier; of EfficientNet the names of the
    `efficientnet-pytorch` packages are understood too.

    Raises:
        InputError: for an unknown name.
        ArtefactError: for weights that cannot be had.
    """
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        _check_name(name)
    if not isinstance(pretrained, bool):
        model = timm.create_model(name)
        load_timm_weights(model, pretrained)
        return TimmEncoder(model)
    if pretrained:
        _require_safe_loading()
    try:
        return TimmEncoder(timm.create_model(name, pretrained=pretrained))
    except Exception as error:  # whatever the hub's client raises without a network
        raise ArtefactError(
            f"the weights of timm's {name!r} could not be had ({type(error).__name__}: {error}); "
            "give a file with pretrained=PATH, or pretrained=False for random ones"
        ) from error


def load_timm_weights(model: nn.Module, path: Path | str) -> None:
    """Load a file into a timm model, every tensor of it.

    Raises:
        ArtefactError: unless all fit.
    """
    tensors = read_state_dict(path)
    if is_foreign(tensors):
        tensors = timm_names(tensors, model)
    load_weights(model, tensors, str(path))


def is_timm(model: object) -> bool:
    """Whether this is a model of timm's, or one made in its manner."""
    return isinstance(model, nn.Module) and all(
        hasattr(model, name) for name in ("forward_features", "forward_head", "num_features")
    )


def _size(model: nn.Module, configured: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that the model was made for, which its pretrained configuration may not be.

    A ViT made with `img_size=...` takes that size and no other.
    """
    made = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return configured if made is None else (int(made[0]), int(made[1]))


def _check_name(name: str) -> None:
    if not timm.is_model(name.partition(".")[0]):
        close = nearest_names(name, timm.list_models(), most=2)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise InputError(f"timm has no model {name!r}.{hint} timm.list_models() lists them all.")


def _require_safe_loading() -> None:
    # Older releases unpickled what they downloaded with everything allowed.
    parameter = inspect.signature(load_state_dict).parameters.get("weights_only")
    if parameter is None or parameter.default is not True:
        raise ArtefactError(
            "this version of timm executes pickles when it loads weights; install a newer one "
            "(weights_only=True by default), or pass a model that you made yourself"
        )
