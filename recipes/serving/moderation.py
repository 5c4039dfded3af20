"""`POST /v1/moderations`: pictures are judged without an answer; texts are taken and not judged.

Who asks shows the picture to somebody else afterwards, and may read its file in another way. So a
file that shows another picture then is flagged, as `ambiguous`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

from vqguard.images import Readings
from vqguard.recipes.serving.answering.jobs import Screened
from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.pictures import File, open_all_readings, origin_of
from vqguard.recipes.serving.screening import screen
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.refusals import bad_request, too_large
from vqguard.recipes.serving.wire.replies import (
    AMBIGUOUS,
    ModerationReply,
    ModerationResult,
    PictureVerdict,
    guard_reply,
)
from vqguard.recipes.serving.wire.schema import ImagePart, ModerationRequest

_OPENAI = ("omni-moderation", "text-moderation")
"""Names that clients ask for by default."""


async def moderate(
    service: Service, request: ModerationRequest, receive: Receive, facts: dict[str, Any]
) -> ModerationReply:
    """One result for all parts of an input, or one for each text of a list.

    Raises:
        RequestError: it cannot be judged.
    """
    if request.model is not None and not request.model.startswith(_OPENAI):
        service.require_model(request.model)
    given = request.input
    parts: Sequence[Any] = [given] if isinstance(given, str) else given
    if not parts:
        raise bad_request("expected an input, got an empty list", param="input")
    if len(parts) > service.limits.messages:
        raise too_large("inputs", service.limits.messages, "input")
    urls = [
        (f"input.{place}", part.image_url.url)
        for place, part in enumerate(parts)
        if isinstance(part, ImagePart)
    ]
    facts["pictures"] = len(urls)
    nothing = Screened([], service.engine.safety_map.version)
    if not urls:
        results = len(parts) if isinstance(parts[0], str) else 1
        return _reply(service, [_result(service, nothing, [])] * results)
    files = await service.files(urls)
    opened = await service.in_thread(partial(_opened, service, files))
    pictures = [reading.picture for reading in opened]
    screened = await screen(service, pictures, origin_of(facts["id"], files), receive, "input")
    result = _result(service, screened, [reading.ambiguous for reading in opened])
    facts["flagged"] = sum(picture.flagged for picture in result.guard.pictures)
    return _reply(service, [result])


def _opened(service: Service, files: list[File]) -> list[Readings]:
    converted = service.run.converts_to_rgb
    return open_all_readings(files, service.limits, converted=converted)


def _result(service: Service, screened: Screened, ambiguous: list[str]) -> ModerationResult:
    guard = guard_reply(screened.verdicts, screened.map_version, reasons=service.reasons)
    for picture, why in zip(guard.pictures, ambiguous, strict=True):
        _mark(picture, why)
    scores = {
        verdict.category: verdict.probability
        for verdict in screened.verdicts
        if verdict.reason is not None
    }
    scores |= {AMBIGUOUS: 1.0} if any(ambiguous) else {}
    names = sorted({*service.engine.safety_map.categories, AMBIGUOUS, *scores})
    return ModerationResult(
        flagged=any(picture.flagged for picture in guard.pictures),
        categories={name: name in scores for name in names},
        category_scores={
            name: scores.get(name, 0.0) if service.reasons else float(name in scores)
            for name in names
        },
        category_applied_input_types={
            name: ["image"] if screened.verdicts else [] for name in names
        },
        guard=guard,
    )


def _mark(picture: PictureVerdict, why: str) -> None:
    """A file that shows several pictures is flagged; what else is known of it stays."""
    if why:
        picture.flagged, picture.ambiguous = True, why
        if picture.action in ("none", "report"):
            picture.action, picture.category = "refuse", AMBIGUOUS


def _reply(service: Service, results: list[ModerationResult]) -> ModerationReply:
    return ModerationReply(id=f"modr-{uuid.uuid4().hex}", model=service.name, results=results)
