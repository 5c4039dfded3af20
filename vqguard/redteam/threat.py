"""Threat models: what the attacker knows and which gradient is used, one sentence each.

A defense rate means nothing without the attacker it was measured against, so every record names
one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class ThreatModel:
    """An attacker. Those that the project brings are attributes of this class."""

    value: str
    """What a record carries."""
    sentence: str
    """What this attacker knows and can do, in one sentence."""
    adaptive: bool = False
    """Whether the attacker knows of the quantiser and works around it."""

    NONE: ClassVar[ThreatModel]
    TOXIC_IMAGE: ClassVar[ThreatModel]
    WHITE_BOX: ClassVar[ThreatModel]
    QUANTISER_REMOVED: ClassVar[ThreatModel]
    GRADIENT_STOPPED: ClassVar[ThreatModel]
    STRAIGHT_THROUGH: ClassVar[ThreatModel]
    SOFTMAX: ClassVar[ThreatModel]
    TRANSFER: ClassVar[ThreatModel]
    TYPOGRAPHIC: ClassVar[ThreatModel]
    SCORES: ClassVar[ThreatModel]
    DECISIONS: ClassVar[ThreatModel]
    CORRUPTION: ClassVar[ThreatModel]


ThreatModel.NONE = ThreatModel("none", "Nobody attacks: images and requests come as they are.")
ThreatModel.TOXIC_IMAGE = ThreatModel(
    "toxic_image",
    "Somebody shows a toxic image as it is; nothing is optimised against the guard.",
)
ThreatModel.WHITE_BOX = ThreatModel(
    "white_box",
    "The attacker has the weights of a model without a quantiser and follows the exact "
    "gradient of its loss to the pixels, within the L-infinity budget.",
)
ThreatModel.QUANTISER_REMOVED = ThreatModel(
    "quantiser_removed",
    "A control, not a deployment: the guarded model runs with its quantiser taken out, and "
    "the attacker follows the exact gradient.",
)
ThreatModel.GRADIENT_STOPPED = ThreatModel(
    "gradient_stopped",
    "The paper's attacker: has all weights but differentiates the argmin as it is, so the "
    "gradient is exactly zero and only random starts are searched.",
)
ThreatModel.STRAIGHT_THROUGH = ThreatModel(
    "adaptive_straight_through",
    "The attacker has all weights, knows of the quantiser and differentiates through it as if "
    "it were the identity (BPDA), with momentum and restarts.",
    adaptive=True,
)
ThreatModel.SOFTMAX = ThreatModel(
    "adaptive_softmax",
    "The attacker has all weights, knows of the quantiser and differentiates a softmax over "
    "the nearest codewords in its place, with momentum and restarts.",
    adaptive=True,
)
ThreatModel.TRANSFER = ThreatModel(
    "transfer",
    "The attacker has other models and all of their weights, makes pictures on them, and sees of "
    "the victim only whether one of them works.",
    adaptive=True,
)
ThreatModel.TYPOGRAPHIC = ThreatModel(
    "typographic",
    "The attacker has no weights and optimises nothing: the request is written into the picture, "
    "and harmless words stand beside it.",
)
ThreatModel.SCORES = ThreatModel(
    "scores",
    "The attacker has no weights and follows no gradient, and sees for each picture that he sends "
    "how far the model is from what he wants, as a number.",
)
ThreatModel.DECISIONS = ThreatModel(
    "decisions",
    "The attacker has no weights and sees nothing but what anybody sees: what is answered and what "
    "is refused.",
)
ThreatModel.CORRUPTION = ThreatModel(
    "corruption",
    "Nobody attacks: pictures are noisy, blurred, compressed, resized or cropped, and nothing is "
    "optimised.",
)
