"""`POST /v1/moderations`: pictures are judged without an answer; texts are taken and not judged."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.file_verdicts import FileVerdicts, judge_files
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.refusals import bad_request, too_large
from vqguard.recipes.serving.wire.replies import AMBIGUOUS, ModerationReply, ModerationResult
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
    judged = await judge_files(service, urls, receive, facts)
    results = len(parts) if not urls and isinstance(parts[0], str) else 1
    return _reply(service, [_result(service, judged)] * results)


def _result(service: Service, judged: FileVerdicts) -> ModerationResult:
    verdicts = judged.screened.verdicts
    scores = {v.category: v.probability for v in verdicts if v.reason is not None}
    scores |= {AMBIGUOUS: 1.0} if judged.ambiguous else {}
    names = sorted({*service.engine.safety_map.categories, AMBIGUOUS, *scores})
    return ModerationResult(
        flagged=judged.flagged,
        categories={name: name in scores for name in names},
        category_scores={
            name: scores.get(name, 0.0) if service.reasons else float(name in scores)
            for name in names
        },
        category_applied_input_types={name: ["image"] if verdicts else [] for name in names},
        guard=judged.reply,
    )


def _reply(service: Service, results: list[ModerationResult]) -> ModerationReply:
    return ModerationReply(id=f"modr-{uuid.uuid4().hex}", model=service.name, results=results)
