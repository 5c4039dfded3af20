"""Threat models: what the attacker knows and which gradient is used, one sentence each.

A defense rate means nothing without the attacker it was measured against, so every record names
one of these.
"""

from __future__ import annotations

from enum import Enum

from vqguard.errors import ConfigError


class ThreatModel(str, Enum):
    """The attackers that this project measures. The value is what a record carries."""

    NONE = "none"
    TOXIC_IMAGE = "toxic_image"
    WHITE_BOX = "white_box"
    QUANTISER_REMOVED = "quantiser_removed"
    GRADIENT_STOPPED = "gradient_stopped"
    STRAIGHT_THROUGH = "adaptive_straight_through"
    SOFTMAX = "adaptive_softmax"

    @property
    def sentence(self) -> str:
        """What this attacker knows and can do, in one sentence."""
        return _SENTENCES[self]

    @property
    def adaptive(self) -> bool:
        """Whether the attacker knows of the quantiser and works around it."""
        return self in (ThreatModel.STRAIGHT_THROUGH, ThreatModel.SOFTMAX)


_SENTENCES = {
    ThreatModel.NONE: "Nobody attacks: images and requests come as they are.",
    ThreatModel.TOXIC_IMAGE: (
        "Somebody shows a toxic image as it is; nothing is optimised against the guard."
    ),
    ThreatModel.WHITE_BOX: (
        "The attacker has the weights of a model without a quantiser and follows the exact "
        "gradient of its loss to the pixels, within the L-infinity budget."
    ),
    ThreatModel.QUANTISER_REMOVED: (
        "A control, not a deployment: the guarded model runs with its quantiser taken out, and "
        "the attacker follows the exact gradient."
    ),
    ThreatModel.GRADIENT_STOPPED: (
        "The paper's attacker: has all weights but differentiates the argmin as it is, so the "
        "gradient is exactly zero and only random starts are searched."
    ),
    ThreatModel.STRAIGHT_THROUGH: (
        "The attacker has all weights, knows of the quantiser and differentiates through it as if "
        "it were the identity (BPDA), with momentum and restarts."
    ),
    ThreatModel.SOFTMAX: (
        "The attacker has all weights, knows of the quantiser and differentiates a softmax over "
        "the nearest codewords in its place, with momentum and restarts."
    ),
}

_OF_GRADIENT = {
    "plain": ThreatModel.WHITE_BOX,
    "stopped": ThreatModel.GRADIENT_STOPPED,
    "straight_through": ThreatModel.STRAIGHT_THROUGH,
    "softmax": ThreatModel.SOFTMAX,
}


def threat_of_gradient(mode: str, *, quantiser_removed: bool = False) -> ThreatModel:
    """The threat model of an attack that crosses the quantiser with this gradient mode.

    Args:
        mode: "plain", "stopped", "straight_through" or "softmax".
        quantiser_removed: the subject is a guarded model whose quantiser was taken out.

    Raises:
        ConfigError: unknown mode, or a removed quantiser with any mode but "plain".
    """
    if mode not in _OF_GRADIENT:
        raise ConfigError(f"unknown gradient mode {mode!r}; choose one of {sorted(_OF_GRADIENT)}")
    if not quantiser_removed:
        return _OF_GRADIENT[mode]
    if mode != "plain":
        raise ConfigError(
            f"gradient mode {mode!r} needs a quantiser, but it is removed; use 'plain'"
        )
    return ThreatModel.QUANTISER_REMOVED
