"""`POST /ui/picture`: all that the guard says of one picture, for the page alone.

Scores of what is not flagged help whoever searches for a picture that passes, so no other route
tells them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel

from vqguard.judging.verdict import Verdict
from vqguard.recipes.report.explain import region_in_picture
from vqguard.recipes.serving.answering.jobs import PictureCodes, Screened
from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.pictures import open_all_readings, origin_of
from vqguard.recipes.serving.screening import screen
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.replies import GuardReply, guard_reply
from vqguard.recipes.serving.wire.schema import ImageURL, Strict
from vqguard.regional.layout import Grid

_PARAM = "image_url"


class PictureRequest(Strict):
    """One picture."""

    image_url: ImageURL


class Score(BaseModel):
    """What is compared with a threshold."""

    score: float
    threshold: float


class Box(BaseModel):
    """A part of the picture: shares of its width and height, 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float


class CodeGrid(BaseModel):
    """Codes of visual tokens that lie row by row."""

    rows: int
    columns: int
    codes: list[int]


class PictureReply(BaseModel):
    """What the guard says of one picture, flagged or not."""

    width: int
    height: int
    guard: GuardReply
    """As in a chat's answer."""
    categories: dict[str, Score]
    any_category: Score | None
    """What decides where one threshold is for all categories together."""
    box: Box | None
    """The region that decided; None where there is none, or its place is not known."""
    grids: list[CodeGrid]
    """Of each tile; none where the guard judges alone."""
    codebook: int
    """How many codes there are."""
    ambiguous: str | None
    """Why another reader may see another picture in this file."""


async def look(
    service: Service, request: PictureRequest, receive: Receive, facts: dict[str, Any]
) -> PictureReply:
    """Judge a picture, and tell all.

    Raises:
        RequestError: it cannot be judged.
    """
    files = await service.files([(_PARAM, request.image_url.url)])
    read: list[tuple[int, int, str]] = []

    def opened() -> list[Image.Image]:
        (reading,) = open_all_readings(files, service.limits, converted=service.run.converts_to_rgb)
        read.append((*reading.picture.size, reading.ambiguous))
        return [reading.picture]

    origin = origin_of(facts["id"], files)
    screened = await screen(service, opened, origin, receive, _PARAM, codes=True)
    (verdict,), (width, height, ambiguous) = screened.verdicts, read[0]
    facts |= {"pictures": 1, "flagged": int(verdict.flagged)}
    return PictureReply(
        width=width,
        height=height,
        guard=guard_reply(screened.verdicts, screened.map_version, reasons=True),
        categories=_category_scores(screened, verdict),
        any_category=_any_category(screened, verdict),
        box=_box(service, verdict, (width, height)),
        grids=[grid for codes in screened.codes for grid in _grids(codes)],
        codebook=service.run.model.vqguard.patch.codebook.codes if screened.codes else 0,
        ambiguous=ambiguous or None,
    )


def _category_scores(screened: Screened, verdict: Verdict) -> dict[str, Score]:
    safety_map = screened.safety_map
    scores = safety_map.category_scores(torch.tensor([verdict.codes]))[0].tolist()
    return {
        name: Score(score=score, threshold=safety_map.thresholds[name])
        for name, score in zip(safety_map.categories, scores, strict=True)
    }


def _any_category(screened: Screened, verdict: Verdict) -> Score | None:
    if screened.safety_map.judging.thresholds:
        return None
    return Score(score=verdict.probability, threshold=screened.safety_map.tau)


def _box(service: Service, verdict: Verdict, size: tuple[int, int]) -> Box | None:
    region = None if verdict.reason is None else verdict.reason.region
    if region is None:
        return None
    corners = region_in_picture(region, size, service.run.image_processor)
    if corners is None:
        return None
    left, top, right, bottom = corners
    width, height = size
    return Box(left=left / width, top=top / height, right=right / width, bottom=bottom / height)


def _grids(picture: PictureCodes) -> list[CodeGrid]:
    """A picture's codes, grid by grid; as a square where their places are not known."""
    layout: tuple[Grid, ...] | None = picture.layout
    if layout is None:
        columns = max(1, math.isqrt(len(picture.codes)))
        layout = ((-(-len(picture.codes) // columns), columns),)
    grids, start = [], 0
    for rows, columns in layout:
        codes = list(picture.codes[start : start + rows * columns])
        grids.append(CodeGrid(rows=rows, columns=columns, codes=codes))
        start += rows * columns
    return grids
