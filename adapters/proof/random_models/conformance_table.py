"""The conformance table: every family of the installed transformers, on tiny random models."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from vqguard.adapters.features import Site
from vqguard.adapters.proof.conformance import check, run_check
from vqguard.adapters.proof.picture_checks import beside_others
from vqguard.adapters.proof.random_models.build import build_tiny, mapped_types
from vqguard.adapters.proof.random_models.inputs import make_inputs
from vqguard.adapters.proof.results import CheckResult
from vqguard.adapters.registry import adapter_types, declared_family, get_adapter
from vqguard.adapters.runtime.known_arguments import AUDIO, FAMILIES, PIXELS, SIDES
from vqguard.adapters.seams import original_method, way_to

Row = dict[str, Any]
"""One family: `status`, `detail`, `sites`, `global`, `joins`, `video`, `refuses`, `arguments` and
`checks`."""


def run_table(
    types: Sequence[str] = (), report: Callable[[str, Row, float], None] | None = None
) -> dict[str, Any]:
    """The results of all checks for these types, all of them when empty.

    `report` is told each family with its row and the seconds it took.
    """
    rows: dict[str, Row] = {}
    for kind in types or mapped_types():
        started = time.perf_counter()
        rows[kind] = run_family(kind)
        if report is not None:
            report(kind, rows[kind], time.perf_counter() - started)
    return {"transformers": transformers.__version__, "families": dict(sorted(rows.items()))}


def run_family(kind: str) -> Row:
    """All checks of one family, at each of its sites, on images and on videos.

    `status`: "guarded" when every check passed; "no-bypass" when the probe and the white-box check
    passed and another did not; "refused" where `guard_model` takes it only on proof or not at all;
    "no pixels".
    """
    family = declared_family(kind)
    if family.blind:
        return {"status": "no pixels", "detail": family.blind, "checks": {}}
    if family.refused:
        return {"status": "refused", "detail": family.refused, "checks": {}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_tiny(kind)
        if kind not in adapter_types():
            return {"status": "refused", "detail": "no adapter names it", "checks": {}}
        return _run(model, get_adapter(model))


def proven_arguments(model: Any) -> list[str]:
    """What the family's own methods take beside the prompt, of what is known: the checks' inputs.

    Of the names that `forward` has here, new ones among them, only those that are read and listed
    in `known_arguments.py`; what a family's random inputs hold is among them.
    """
    adapter = get_adapter(model)
    known = {*AUDIO, *FAMILIES, *SIDES, *PIXELS}
    taken: set[str] = set()
    for seam in adapter.seams(model):
        way = way_to(model, seam)
        methods = [original_method(module, "forward") for module in way]
        for method in (*methods, original_method(way[-1], seam.method)):
            taken |= inspect.signature(method).parameters.keys()
    return sorted(taken & known)


def _run(model: Any, adapter: Any) -> Row:
    seams = adapter.seams(model)
    modalities = sorted({seam.modality for seam in seams})
    checks: dict[str, dict[str, str]] = {}
    details: list[str] = []
    proved = True
    for modality in modalities:
        inputs = make_inputs(model, (1, 2), modality=modality)
        for site in adapter.sites:
            results = [*check(model, inputs, site=site).results, _beside(model, modality, site)]
            checks[f"{modality} {site}"] = {result.name: result.status for result in results}
            details += [f"{r.name}: {r.detail}" for r in results if r.status == "failed"]
            statuses = checks[f"{modality} {site}"]
            proved &= statuses["probe"] == statuses["codewords"] == "passed"
    failed = any("failed" in statuses.values() for statuses in checks.values())
    return {
        "status": "refused" if not proved else "no-bypass" if failed else "guarded",
        "detail": "; ".join(dict.fromkeys(details)),
        "adapter": type(adapter).__name__,
        "sites": list(adapter.sites),
        "joins": sorted({seam.joins for seam in seams}),
        "global": adapter.global_token_note,
        "video": "video" in modalities,
        "deep": adapter.deep_levels(model) > 0,
        "audio": any("audio" in name for name, _ in model.named_modules()),
        "refuses": adapter.refused_note,
        "arguments": proven_arguments(model),
        "checks": checks,
    }


def _beside(model: Any, modality: str, site: Site) -> CheckResult:
    """One picture in a row with three others, in rows of its own beside them, and alone."""
    layouts = [make_inputs(model, rows, modality=modality) for rows in ((4,), (1, 3), (1, 1, 1, 1))]
    if declared_family(model.config.model_type).random_model.one_a_row:
        layouts = layouts[-1:]
    alone = make_inputs(model, (1,), modality=modality)
    names = [name for seam in get_adapter(model).given(model, alone) for name in seam.pixels]
    if all(_begins_with(layouts[0][name], alone[name]) for name in names if name in alone):
        layouts.append(alone)
    return run_check("neighbours", beside_others(layouts), model, layouts[0], site)


def _begins_with(pixels: Tensor, start: Tensor) -> bool:
    """Whether the first picture of one is that of the other."""
    return torch.equal(pixels.flatten()[: start.numel()], start.flatten())
