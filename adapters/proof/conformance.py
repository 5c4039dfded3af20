"""The conformance kit: does the guard hold in this model, on these inputs?

    from vqguard.adapters.proof.conformance import check
    report = check(model, inputs)

Run on every family of the project, and meant for adapters of your own. Each check is a property of
the model's behaviour; none trusts what the adapter says about itself.
"""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from vqguard.adapters.features import Site
from vqguard.adapters.install import unguard_model
from vqguard.adapters.proof.bypass_checks import arguments, codewords, probe
from vqguard.adapters.proof.guarded_subject import judging_alone
from vqguard.adapters.proof.model_checks import gradients, removal, storage, text
from vqguard.adapters.proof.picture_checks import covered, names, pictures
from vqguard.adapters.proof.probe import bare
from vqguard.adapters.proof.results import (
    Check,
    CheckResult,
    Conformance,
    FailedCheckError,
    NotApplicableError,
)
from vqguard.adapters.proof.verdict_checks import all_refused, batch, modes, regional, rows
from vqguard.adapters.registry import get_adapter
from vqguard.errors import ConfigError, first_line

CHECKS: dict[str, Check] = {
    "probe": probe,
    "codewords": codewords,
    "rows": rows,
    "regional": regional,
    "all refused": all_refused,
    "batch": batch,
    "modes": modes,
    "pictures": pictures,
    "covered": covered,
    "names": names,
    "removal": removal,
    "storage": storage,
    "gradients": gradients,
    "text": text,
    "arguments": arguments,
}


_BOTTLENECK = ("probe", "codewords", "gradients")
"""What only a guard that quantises can have."""


def check(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    site: Site = "projected",
    only: tuple[str, ...] = (),
    quantises: bool = True,
) -> Conformance:
    """Run every check on an unguarded `model`, which is left as it was.

    A guard it has is kept out of the way and put back.

    `inputs`: what the model's processor returns for a batch with at least two images, in rows of
    their own where the family allows it; a padded batch with rows of unlike length says most.
    `only`: names of checks, all when empty. `quantises`: False for what can be proven of a judge
    alone; the checks of the bottleneck are skipped then.

    A check that raises an unexpected error has failed. Checks that say nothing about a model (text
    alone, for one that needs a picture) are skipped with the reason.
    """
    get_adapter(model).require_site(site)
    results = []
    with bare(model), nullcontext() if quantises else judging_alone():
        for name, run in CHECKS.items():
            if only and name not in only:
                continue
            if name in _BOTTLENECK and not quantises:
                results.append(CheckResult(name, "skipped", "visual tokens are not quantised"))
            else:
                results.append(run_check(name, run, model, inputs, site))
    kind: Any = model.config.model_type  # type: ignore[union-attr]
    return Conformance(kind, site, tuple(results), quantises)


def run_check(
    name: str, run: Check, model: nn.Module, inputs: Mapping[str, Any], site: Site
) -> CheckResult:
    """One check of an unguarded model in eval mode; an unexpected error is a failure."""
    try:
        run(model, inputs, site)
    except NotApplicableError as reason:
        return CheckResult(name, "skipped", str(reason))
    except FailedCheckError as reason:
        return CheckResult(name, "failed", str(reason))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return CheckResult(name, "failed", f"{first_line(error)} (in {where.name})")
    finally:
        model.zero_grad()
        if getattr(model, "vqguard", None) is not None:
            unguard_model(model)
    return CheckResult(name, "passed")


def example_inputs(processor: Any) -> dict[str, Any]:
    """A padded batch of two noise pictures of unlike size and strength, by a model's processor.

    Raises:
        ConfigError: when the processor names no image token: write the inputs yourself then.
    """
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
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
    return dict(inputs)
