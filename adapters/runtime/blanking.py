"""Which visual tokens of a picture are blanked: those under its flagged regions, or all."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.quantise import Quantised
from vqguard.adapters.seams import Seam
from vqguard.safety_map import UNFAMILIAR, SafetyMap


def blanked_tokens(link: GuardLink, seam: Seam, result: Quantised, image: int) -> Tensor | None:
    """(N_i,) bool, the places of a flagged image's unit that are blanked; None: all of them.

    Each region is judged alone; those that are flagged are blanked, in every grid that shows the
    picture. All is blanked where that would not do: the judge is global; no grid is known; grids
    show tiles, whose place in the small version of the whole is not known, or frames, whose
    neighbours show the same thing; what is left would still be flagged; all of the picture is
    unfamiliar; or the places of the tokens in what the seam gives are not known.
    """
    guard, guarded = link.guard, result.guarded
    safety_map, regional = guard.safety_map, guard.regional
    layout = None if guarded.layouts is None else guarded.layouts[image]
    if regional is None or safety_map is None or layout is None:
        return None
    site = guard.config.site
    if link.adapter.part(seam, site, layout) != "picture":
        return None
    if site == "encoder" and not link.adapter.tokenwise:
        return None
    judged = guarded.judged
    codes = judged.codes[image]
    own = torch.ones_like(codes, dtype=torch.bool) if judged.mask is None else judged.mask[image]
    if judged.visual is not None and _flags_all(safety_map, judged.visual[image]):
        return None
    distances = None if judged.distances is None else judged.distances[image][own]
    codes = codes[own]
    alone = None if distances is None else distances[:, None]
    flagged = safety_map.flagged(codes[:, None], None, alone)
    rest = ~flagged
    if not bool(flagged.any()) or not bool(rest.any()):
        return None
    left = None if distances is None else distances[rest][None]
    if bool(safety_map.flagged(codes[rest][None], None, left)):
        return None
    cells = regional.projection.windows.cells_under(layout, flagged.nonzero().flatten().tolist())
    if result.constants is None:
        return cells if len(cells) == result.counts[image] else None
    visual = result.constants[image] < 0
    if int(visual.sum()) != len(cells):
        return None
    places = torch.zeros_like(visual)
    places[visual] = cells.to(places.device)
    return places


def _flags_all(safety_map: SafetyMap, visual: Tensor) -> bool:
    """Whether a picture whose visual tokens are so far from codewords is blanked for that."""
    far = safety_map.judging.unfamiliar
    acts = safety_map.judging.policy(UNFAMILIAR).action != "report"
    return far is not None and acts and float(visual) > far.distance
