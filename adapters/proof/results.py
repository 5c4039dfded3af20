"""What a check of the conformance kit is, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vqguard.adapters.features import Site
from vqguard.names import printable

Status = Literal["passed", "failed", "skipped"]


class NotApplicableError(Exception):
    """Raised by a check that says nothing about this model; its text says why."""


class FailedCheckError(Exception):
    """Raised by a check that found the guard wanting; its text says what was found."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found; `detail` says why it failed or was skipped."""

    name: str
    status: Status
    detail: str = ""


@dataclass(frozen=True)
class Conformance:
    """The results of all checks of one model at one site."""

    model_type: str
    site: Site
    results: tuple[CheckResult, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """No check failed, and the two of the bypass were made."""
        statuses = {result.name: result.status for result in self.results}
        proved = all(statuses.get(name) == "passed" for name in ("probe", "codewords"))
        return proved and "failed" not in statuses.values()

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if result.status == "failed")

    def __str__(self) -> str:
        lines = [
            f"{self.model_type} at site {self.site!r}: {'passed' if self.passed else 'FAILED'}"
        ]
        lines += [
            printable(
                f"  {result.status:8}{result.name}{': ' + result.detail if result.detail else ''}"
            )
            for result in self.results
        ]
        return "\n".join(lines)


Check = Callable[[nn.Module, Mapping[str, Any], Site], None]
"""One property of the behaviour of an unguarded model in eval mode, at a site."""
