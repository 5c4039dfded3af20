"""The conformance table: every family of the installed transformers, on tiny random models."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import transformers

from vqguard.adapters.proof.conformance import check
from vqguard.adapters.proof.random_models.build import build_tiny, mapped_types
from vqguard.adapters.proof.random_models.inputs import make_inputs
from vqguard.adapters.registry import adapter_types, declared_family, get_adapter

Row = dict[str, Any]
"""One family: `status`, `detail`, `sites`, `global`, `joins`, `video`, `refuses` and `checks`."""


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


def _run(model: Any, adapter: Any) -> Row:
    seams = adapter.seams(model)
    modalities = sorted({seam.modality for seam in seams})
    checks: dict[str, dict[str, str]] = {}
    details: list[str] = []
    proved = True
    for modality in modalities:
        inputs = make_inputs(model, (1, 2), modality=modality)
        for site in adapter.sites:
            proof = check(model, inputs, site=site)
            checks[f"{modality} {site}"] = {result.name: result.status for result in proof.results}
            details += [f"{result.name}: {result.detail}" for result in proof.failures]
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
        "checks": checks,
    }
