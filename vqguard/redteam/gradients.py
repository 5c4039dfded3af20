"""The table of ways in which an attacker's gradient crosses the quantiser of a guarded model.

| mode | forward value | gradient |
| --- | --- | --- |
| plain | the feature itself: no quantiser | exact |
| stopped | the codeword | exactly zero (the paper's threat model) |
| straight_through | the codeword | the identity (BPDA: Athalye et al. 2018, arXiv 1802.00420) |
| softmax | the codeword | of a softmax over the nearest codewords |

"plain" is for a model without a guard, where nothing has to be crossed, and for the control with
the quantiser removed. All modes go through `vqguard.codebooks.quantizer.use_estimator`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn

from vqguard.codebooks.quantizer import (
    Estimator,
    VectorQuantizer,
    straight_through_estimator,
    use_estimator,
)
from vqguard.errors import ConfigError
from vqguard.redteam.modes import GradientMode
from vqguard.redteam.named_table import NamedTable
from vqguard.redteam.softmax import SOFTMAX, SoftmaxEstimator
from vqguard.redteam.threat import ThreatModel


def plain_estimator(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
    """The feature itself: as if there were no quantiser."""
    return features


def stopped_estimator(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
    """The codeword without a gradient: an argmin differentiated as it is."""
    return codewords.detach()[indices].to(features.dtype)


PLAIN = GradientMode(
    name="plain",
    label="plain gradient",
    threat_model=ThreatModel.WHITE_BOX,
    estimator=plain_estimator,
    needs_quantiser=False,
)
STOPPED = GradientMode(
    name="stopped",
    label="gradient stopped (paper)",
    threat_model=ThreatModel.GRADIENT_STOPPED,
    estimator=stopped_estimator,
)
STRAIGHT_THROUGH = GradientMode(
    name="straight_through",
    label="straight-through (adaptive)",
    threat_model=ThreatModel.STRAIGHT_THROUGH,
    estimator=straight_through_estimator,
)

GRADIENTS = NamedTable(
    "gradient mode",
    PLAIN,
    STOPPED,
    STRAIGHT_THROUGH,
    SOFTMAX,
)
"""All modes. A mode of a file of its own is entered here, one of another package by
`GRADIENTS.register(mode)`."""


def measured_modes(*, quantised: bool) -> list[GradientMode]:
    """The modes by which every report attacks a model with a quantiser, or one without."""
    return [mode for mode in GRADIENTS if mode.measured and mode.needs_quantiser == quantised]


def threat_models() -> list[ThreatModel]:
    """Every attacker that a report may name: the project's own and those of registered modes."""
    others = [
        ThreatModel.NONE,
        ThreatModel.TOXIC_IMAGE,
        ThreatModel.WHITE_BOX,
        ThreatModel.QUANTISER_REMOVED,
        ThreatModel.TRANSFER,
        ThreatModel.TYPOGRAPHIC,
        ThreatModel.SCORES,
        ThreatModel.DECISIONS,
        ThreatModel.CORRUPTION,
    ]
    return list(dict.fromkeys([*others, *(mode.threat_model for mode in GRADIENTS)]))


def threat_of_gradient(mode: GradientMode | str, *, quantiser_removed: bool = False) -> ThreatModel:
    """The threat model of an attack that crosses the quantiser with this gradient mode.

    Args:
        mode: a mode, or the name of one in `GRADIENTS`.
        quantiser_removed: the subject is a guarded model whose quantiser was taken out.

    Raises:
        ConfigError: unknown mode, or a removed quantiser with a mode that needs one.
    """
    if isinstance(mode, str):
        mode = GRADIENTS.named(mode)
    if not quantiser_removed:
        return mode.threat_model
    if mode.needs_quantiser:
        raise ConfigError(
            f"gradient mode {mode.name!r} needs a quantiser, but it is removed; use 'plain'"
        )
    return ThreatModel.QUANTISER_REMOVED


@dataclass(frozen=True)
class GradientPath:
    """A gradient mode by its name, with settings.

    Raises:
        ConfigError: unknown mode or a setting out of range.
    """

    mode: str = "plain"
    """How the quantiser is crossed: a name in `GRADIENTS`."""
    temperature: float = 0.1
    """Of the softmax mode, see `SoftmaxEstimator`."""
    neighbours: int = 16
    """Of the softmax mode, see `SoftmaxEstimator`."""

    def __post_init__(self) -> None:
        GRADIENTS.named(self.mode)
        SoftmaxEstimator(self.temperature, self.neighbours)

    def estimator(self) -> Estimator:
        """The estimator that `vqguard.codebooks.quantizer.use_estimator` takes."""
        estimator = GRADIENTS.named(self.mode).estimator
        if isinstance(estimator, SoftmaxEstimator):
            return SoftmaxEstimator(self.temperature, self.neighbours)
        return estimator


def _resolved(path: GradientPath | GradientMode | str) -> GradientMode:
    if isinstance(path, GradientPath):
        return replace(GRADIENTS.named(path.mode), estimator=path.estimator())
    return GRADIENTS.named(path) if isinstance(path, str) else path


@contextlib.contextmanager
def crossing(module: nn.Module, path: GradientPath | GradientMode | str) -> Iterator[None]:
    """Inside, gradients cross every quantiser in `module` by this path.

    The backward pass may run after the context: a graph keeps the estimator it was built with.

    Raises:
        ConfigError: unknown mode, or the module has no quantiser and the mode needs one.
    """
    mode = _resolved(path)
    if not any(isinstance(part, VectorQuantizer) for part in module.modules()):
        if mode.needs_quantiser:
            raise ConfigError(
                f"gradient mode {mode.name!r} crosses a quantiser, but {type(module).__name__} "
                "has none; use 'plain' for an undefended model, or guard it first"
            )
        yield
        return
    with use_estimator(module, mode.estimator):
        yield
