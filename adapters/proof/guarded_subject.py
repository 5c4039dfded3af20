"""What the checks of the conformance kit share: a model with a guard of its own features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Site, VisualFeatures
from vqguard.adapters.install import build_guard, install_link, unguard_model
from vqguard.adapters.proof.probe import exercised, redraw
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.quantise import visual_features
from vqguard.regional.judge import RegionalJudge
from vqguard.safety_map import SafetyMap
from vqguard.scopes.context import Opened

NEW_TOKENS = 3
REFUSAL = (7, 8, 9)
CODES = 24
_STARTS = 16


_ALONE: Opened[None] = Opened("vqguard_checked_alone")


@contextmanager
def judging_alone() -> Iterator[None]:
    """Inside, the guards of the checks judge alone: they quantise no visual token."""
    with _ALONE.put(None):
        yield


@contextmanager
def guarded(
    model: nn.Module, inputs: Mapping[str, Any], site: Site, *, regional: bool = False
) -> Iterator[VisualFeatures]:
    """Inside, the model has a guard whose entries are features of these inputs.

    It flags nothing; every image has a semantic cell of its own where their features differ.
    `regional`: its judge is, with entries that are regions of these images.
    """
    adapter = get_adapter(model)
    with torch.no_grad():
        features = visual_features(model, site, **inputs)
        other = visual_features(model, site, **redraw(adapter, model, inputs, 0))
    semantic = torch.cat(features.semantic_units)
    cells, tokens = len(semantic), sum(features.counts)
    guard = build_guard(
        model,
        site=site,
        patch_codes=CODES,
        semantic_codes=cells,
        search="torch",
        levels="semantic" if _ALONE.values() else "both",
        judge="regional" if regional else "global",
        regional={"codes": tokens, "width": 8, "hidden": 16, "windows": [1, 2]},
    )
    if guard.quantises:
        both = [*features.tokens, *other.tokens]
        guard.patch.codebook.start_from(torch.cat(both), "sample")
        for level, own, changed in zip(guard.deep, features.deep, other.deep, strict=False):
            cast(Any, level).codebook.start_from(torch.cat([*own, *changed]), "sample")
    guard.semantic.codebook.start_from(semantic, "sample")
    if guard.regional is not None:
        _start_regions(guard.regional, features)
    proven = exercised(model, inputs)
    install_link(model, GuardLink(guard.eval(), adapter, REFUSAL, adapter.seams(model), proven))
    flag(model, set())
    try:
        yield features
    finally:
        unguard_model(model)


def _start_regions(judge: RegionalJudge, features: VisualFeatures) -> None:
    """A projection that does not see all pictures as nothing, and regions of theirs as entries."""
    for seed in range(_STARTS):
        judge.projection.start(seed, judge.quantizer.codebook.dim)
        regions, mine = judge.regions(features.tokens, features.layouts)
        rows = regions.detach()[mine] if mine is not None else regions.detach().flatten(0, 1)
        if len(rows.unique(dim=0)) > len(features.tokens):
            break
    judge.quantizer.codebook.start_from(rows, "sample")


def flag(model: nn.Module, codes: set[int]) -> None:
    """Give the guarded model a map that flags these semantic codes."""
    guard = cast(Any, model).vqguard
    counts = torch.zeros(guard.cells, 2, dtype=torch.int64)
    for code in range(len(counts)):
        counts[code, 0 if code in codes else 1] = 3
    checksum = guard.checksum(guard.judge_level)
    guard.safety_map = SafetyMap(("flagged",), counts, codebook_checksum=checksum)


@torch.no_grad()
def logits(adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """What the guarded model answers: (B, T, vocabulary)."""
    return adapter.logits(model, inputs)
