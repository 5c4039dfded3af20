"""The conformance kit: does the guard hold in this model, on these inputs?

    from vqguard.adapters.proof.conformance import check
    report = check(model, inputs)

Run on every family of the project, and meant for adapters of your own. Each check is a property of
the model's behaviour; none trusts what the adapter says about itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from vqguard.adapters.features import Site
from vqguard.adapters.registry import get_adapter

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
        statuses = {one.name: one.status for one in self.results}
        proved = all(statuses.get(name) == "passed" for name in ("probe", "codewords"))
        return proved and "failed" not in statuses.values()

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(one for one in self.results if one.status == "failed")

    def __str__(self) -> str:
        lines = [
            f"{self.model_type} at site {self.site!r}: {'passed' if self.passed else 'FAILED'}"
        ]
        lines += [
            f"  {one.status:8}{one.name}{': ' + one.detail if one.detail else ''}"
            for one in self.results
        ]
        return "\n".join(lines)


Check = Callable[[nn.Module, Mapping[str, Any], Site], None]


def check(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    site: Site = "projected",
    only: tuple[str, ...] = (),
) -> Conformance:
    """Run every check on an unguarded `model`, which is left as it was; a guard it has is kept out
    of the way and put back.

    `inputs`: what the model's processor returns for a batch with at least two images, in rows of
    their own where the family allows it; a padded batch with rows of unlike length says most.
    `only`: names of checks, all when empty.

    A check that raises an unexpected error has failed. Checks that say nothing about a model (text
    alone, for one that needs a picture) are skipped with the reason.
    """
    from vqguard.adapters.checks import CHECKS
    from vqguard.adapters.proof.probe import bare

    get_adapter(model).require_site(site)
    results = []
    with bare(model):
        for name, run in CHECKS.items():
            if not only or name in only:
                results.append(_result(name, run, model, inputs, site))
    return Conformance(model.config.model_type, site, tuple(results))  # type: ignore[union-attr,arg-type]


def _result(
    name: str, run: Check, model: nn.Module, inputs: Mapping[str, Any], site: Site
) -> CheckResult:
    from vqguard.adapters.install import unguard_model

    try:
        run(model, inputs, site)
    except NotApplicableError as reason:
        return CheckResult(name, "skipped", str(reason))
    except FailedCheckError as reason:
        return CheckResult(name, "failed", str(reason))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error).strip().splitlines() or [""]
        detail = f"{type(error).__name__}: {text[0]} (in {where.name})"
        return CheckResult(name, "failed", detail)
    finally:
        model.zero_grad()
        if getattr(model, "vqguard", None) is not None:
            unguard_model(model)
    return CheckResult(name, "passed")


def example_inputs(processor: Any) -> dict[str, Any]:
    """A padded batch of two noise pictures of unlike size and strength, by a model's processor.

    Raises `ConfigError` when the processor names no image token: write the inputs yourself then.
    """
    import numpy as np
    from PIL import Image

    from vqguard.errors import ConfigError

    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ConfigError(
            f"{type(processor).__name__} names no image_token: pass the inputs of a batch of your "
            "own to vqguard.adapters.proof.conformance.check"
        )
    random = np.random.default_rng(0)
    dark = random.integers(0, 90, (96, 96, 3), dtype=np.uint8)
    light = random.integers(120, 255, (96, 144, 3), dtype=np.uint8)
    images = [Image.fromarray(dark), Image.fromarray(light)]
    prompts = [f"{token}\nname it", f"{token}\nwhat is in the picture ?"]
    found = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    return dict(found)
