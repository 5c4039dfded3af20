"""What a check of the conformance kit is, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vqguard.adapters.features import Site
from vqguard.names import printable

Status = Literal["passed", "failed", "skipped"]
JUDGES_ALONE = (
    "The guard judges alone: visual tokens are judged, not quantised. What is not flagged reaches "
    "the language model as it is, an adversarial picture too."
)


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
    quantises: bool = True
    """Whether the guard quantises; False: a judge alone, of which no bottleneck can be proven."""

    @property
    def passed(self) -> bool:
        """No check failed, and the two of the bypass were made; of a judge alone, its refusals."""
        statuses = {result.name: result.status for result in self.results}
        needed = ("probe", "codewords") if self.quantises else ("rows", "all refused")
        proved = all(statuses.get(name) == "passed" for name in needed)
        return proved and "failed" not in statuses.values()

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if result.status == "failed")

    def __str__(self) -> str:
        lines = [
            f"{self.model_type} at site {self.site!r}: {'passed' if self.passed else 'FAILED'}"
        ]
        if not self.quantises:
            lines.append(f"  {JUDGES_ALONE}")
        lines += [
            printable(
                f"  {result.status:8}{result.name}{': ' + result.detail if result.detail else ''}"
            )
            for result in self.results
        ]
        return "\n".join(lines)


Check = Callable[[nn.Module, Mapping[str, Any], Site], None]
"""One property of the behaviour of an unguarded model in eval mode, at a site."""
