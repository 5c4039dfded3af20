"""EfficientNet weights under the names of the `efficientnet-pytorch` packages, renamed for timm.

Both are the same network from the same TensorFlow weights; only the names of the parts differ, and
timm groups the blocks by stage. In a block without expansion (the first stage) the names shift by
one: its depthwise convolution is the first part, not the second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from vqguard.errors import ArtefactError

_MARK = "_conv_stem.weight"
_OUTER = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    **_SQUEEZE,
}
_SEPARABLE = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
    **_SQUEEZE,
}


def is_foreign(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of `efficientnet-pytorch` and its relatives."""
    return _MARK in tensors


def timm_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The same tensors under the names that `model`, timm's EfficientNet, has for them.

    Shapes are not looked at.

    Raises:
        ArtefactError: where the model has no such blocks.
    """
    blocks = [
        f"blocks.{stage}.{place}"
        for stage, parts in enumerate(getattr(model, "blocks", ()))
        for place in range(len(parts))
    ]
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        within = re.fullmatch(r"_blocks\.(\d+)\.([^.]+)\.(.+)", name)
        if within is None:
            part, _, rest = name.partition(".")
            renamed[f"{_OUTER.get(part, part)}.{rest}"] = tensor
            continue
        number, part, rest = int(within[1]), within[2], within[3]
        expands = f"_blocks.{number}._expand_conv.weight" in tensors
        parts = _EXPANDING if expands else _SEPARABLE
        if number >= len(blocks) or part not in parts:
            raise ArtefactError(
                f"{name} has no place in {type(model).__name__} with {len(blocks)} blocks; these "
                "are the weights of an EfficientNet of another size"
            )
        renamed[f"{blocks[number]}.{parts[part]}.{rest}"] = tensor
    return renamed
