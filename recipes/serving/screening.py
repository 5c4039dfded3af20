"""Verdicts on a request's pictures, without an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image

from vqguard.recipes.image_batches import pixel_inputs
from vqguard.recipes.serving.answering.jobs import Origin, Screened, ScreenJob
from vqguard.recipes.serving.answering.tickets import Ticket
from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.door.waiting import LEFT, LeftError, unless_left
from vqguard.recipes.serving.model_errors import raise_request_error
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.refusals import RequestError

_CPU = torch.device("cpu")


async def screen(
    service: Service,
    opened: Callable[[], Sequence[Image.Image]],
    origin: Origin,
    receive: Receive,
    param: str,
    *,
    codes: bool = False,
) -> Screened:
    """One verdict a picture, from the model's thread.

    Args:
        service: whose model judges.
        opened: gives the pictures. They are dropped before the model's turn comes: decoded, they
            are far larger than their files.
        origin: for the audit log.
        receive: says when the client leaves.
        param: what errors name.
        codes: the codes of its visual tokens too.

    Raises:
        RequestError: they cannot be judged, or the client left.
    """

    def pixels() -> tuple[int, dict[str, torch.Tensor]]:
        pictures = opened()
        if not pictures:
            return 0, {}
        with service.encoder.lock:
            return len(pictures), pixel_inputs(service.run.processor, pictures, _CPU)

    count, inputs = await service.in_thread(pixels)
    if not count:
        return Screened([], service.engine.safety_map)
    ticket: Ticket[Screened] = Ticket()
    job = ScreenJob(inputs, count, ticket, service.deadline(), origin, codes=codes)
    service.engine.submit(job)
    try:
        return await unless_left(ticket.result(), receive)
    except LeftError as error:
        job.cancelled = True
        raise RequestError(LEFT, "the client left", code="left") from error
    except BaseException as error:
        job.cancelled = True
        raise_request_error(error, param, reasons=service.reasons)
        raise
