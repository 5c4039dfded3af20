"""Several models as the one that a picture is made on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor

from vqguard.errors import InputError
from vqguard.redteam.attack import entered
from vqguard.redteam.trial import AttackTarget


@dataclass(frozen=True)
class Ensemble:
    """The mean loss over targets with the same requests (Liu et al. 2017, arXiv 1611.02770).

    It succeeds where all of them do.

    Raises:
        InputError: no target, or targets with other numbers of requests.
    """

    targets: Sequence[AttackTarget]
    _entered: list[ExitStack] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len({target.requests for target in self.targets}) != 1:
            raise InputError(
                "expected targets with the same requests, got "
                f"{[target.requests for target in self.targets]}"
            )

    @property
    def requests(self) -> int:
        """How many requests each target has."""
        return self.targets[0].requests

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) the mean of the targets' losses."""
        losses = [target.loss(pixels, request) for target in self.targets]
        return torch.stack(losses).mean(dim=0)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool."""
        each = [target.succeeded(pixels, request) for target in self.targets]
        return torch.stack(each).all(dim=0)

    def __enter__(self) -> Ensemble:
        stack = ExitStack()
        for target in self.targets:
            stack.enter_context(entered(target))
        self._entered.append(stack)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered.pop().close()
