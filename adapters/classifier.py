"""A model as other people's attack tools want it: pixels in [0, 1] in, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vqguard.adapters.attack_target import GenerationTarget
from vqguard.adapters.code_target import CodeTarget
from vqguard.errors import ConfigError
from vqguard.redteam.gradients import GradientPath
from vqguard.redteam.modes import GradientMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

View = Literal["comply", "verdict", "next_token"]


class ClassifierView(nn.Module):
    """One request beside a picture, as a classifier of the picture. See `as_classifier`."""

    def __init__(self, target: GenerationTarget, view: View) -> None:
        super().__init__()
        self.model = target.model
        self.target = target
        self.view = view
        self.eval()

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pixels that it takes."""
        return self.target.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C) float32 logits of pixels (B, 3, H, W) in [0, 1], differentiable."""
        request = torch.zeros(len(pixels), dtype=torch.int64)
        if self.view == "next_token":
            return self.target.next_token(pixels, request).to(pixels.device)
        if self.view == "comply":
            score = self.target.opening_margin(pixels, request)
        else:
            assert isinstance(self.target, CodeTarget)
            score = self.target.verdict_margin(pixels)
        score = score.to(pixels.device)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def as_classifier(
    model: PreTrainedModel,
    processor: Any,
    prompt: str,
    *,
    opening: str = "",
    view: View = "comply",
    gradient: GradientPath | GradientMode | str | None = None,
) -> ClassifierView:
    """A plain `nn.Module` for torchattacks, AutoAttack, foolbox, ART and the like.

    Args:
        model: an image-text-to-text model, guarded or not.
        processor: its processor.
        prompt: the request as the model reads it, chat template applied, one image.
        opening: what an answer begins with that complies; for "comply".
        view: which logits. "comply": class 0 refuses, class 1 complies, which is the class exactly
            where greedy decoding begins with the opening: its logit is the least margin of the
            opening's tokens over all others. "verdict": class 0 is let pass, class 1 is flagged.
            "next_token": the vocabulary, after the prompt.
        gradient: how it crosses the quantiser; default: straight-through on a guarded model, plain
            otherwise.

    Raises:
        ConfigError: "comply" without an opening, "verdict" without a safety map, or a gradient mode
            that the model has no quantiser for.
    """
    guard = getattr(model, "vqguard", None)
    if view == "comply" and not opening:
        raise ConfigError('the view "comply" needs an opening: what an answer that complies says')
    if view == "verdict" and (guard is None or guard.safety_map is None):
        raise ConfigError('the view "verdict" needs a guarded model with a safety map')
    if gradient is None:
        gradient = "plain" if guard is None else "straight_through"
    kind = GenerationTarget if guard is None else CodeTarget
    # without an opening any word will do: it is not looked at
    target = kind(model, processor, [prompt], [opening or "a"], gradient=gradient)
    return ClassifierView(target, view)
