"""Verdicts on files that somebody else will show: in all the ways that they could be read.

A file that shows another picture to another reader is flagged, as `ambiguous`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vqguard.recipes.serving.answering.jobs import Screened
from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.pictures import open_all_readings, origin_of
from vqguard.recipes.serving.screening import screen
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.replies import AMBIGUOUS, GuardReply, guard_reply


@dataclass(frozen=True)
class FileVerdicts:
    """What is said about some files."""

    screened: Screened
    ambiguous: bool
    """Whether one of them shows several pictures."""
    reply: GuardReply

    @property
    def flagged(self) -> bool:
        """Whether one of them is."""
        return any(picture.flagged for picture in self.reply.pictures)


async def judge_files(
    service: Service, urls: Sequence[tuple[str, str]], receive: Receive, facts: dict[str, Any]
) -> FileVerdicts:
    """Judge the files at these addresses; of each what messages call it, and its address.

    Raises:
        RequestError: one cannot be judged.
    """
    files = await service.files(urls)
    why: list[str] = []

    def opened() -> list[Image.Image]:
        readings = open_all_readings(files, service.limits, converted=service.run.converts_to_rgb)
        why.extend(reading.ambiguous for reading in readings)
        return [reading.picture for reading in readings]

    param = urls[0][0].partition(".")[0] if urls else ""
    screened = await screen(service, opened, origin_of(facts["id"], files), receive, param)
    reply = guard_reply(screened.verdicts, screened.map_version, reasons=service.reasons)
    for picture, reason in zip(reply.pictures, why, strict=True):
        if reason:
            picture.ambiguous = reason
            if not picture.flagged:
                picture.category = AMBIGUOUS
                picture.flagged = not service.shadow
                picture.action = "report" if service.shadow else "refuse"
    facts |= {"pictures": len(urls), "flagged": sum(p.flagged for p in reply.pictures)}
    return FileVerdicts(screened, any(why), reply)
