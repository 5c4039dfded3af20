"""`POST /v1/chat/completions`."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.responses import JSONResponse, Response, StreamingResponse

from vqguard.recipes.serving.answering.jobs import AnswerJob
from vqguard.recipes.serving.answering.prompts import EncodedPrompt, picture_urls
from vqguard.recipes.serving.answering.rows import Choosing, Row
from vqguard.recipes.serving.answering.tickets import Ticket
from vqguard.recipes.serving.door.admission import Receive
from vqguard.recipes.serving.door.waiting import LEFT, LeftError, unless_left
from vqguard.recipes.serving.exchange import Exchange, Terms
from vqguard.recipes.serving.model_errors import raise_request_error
from vqguard.recipes.serving.pictures import File, open_pictures, origin_of
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.refusals import too_large
from vqguard.recipes.serving.wire.schema import ChatRequest


async def chat(
    service: Service, request: ChatRequest, receive: Receive, facts: dict[str, Any]
) -> Response:
    """Answer a conversation; a refusal is an answer that ends with `content_filter`.

    Raises:
        RequestError: it cannot be answered.
    """
    job = await answer_job(service, request, facts)
    row, ticket = job.row, job.ticket
    service.engine.submit(job)
    terms = Terms(service.name, service.reasons, len(job.prompt.input_ids))
    exchange = Exchange(terms, row, ticket, facts)
    del job
    try:
        if not request.stream:
            await unless_left(ticket.result(), receive)
            return JSONResponse(exchange.reply())
        # Until the first token is there the answer can still be an error.
        await unless_left(ticket.started(), receive)
    except LeftError:
        row.cancelled = True
        return Response(status_code=LEFT)
    except BaseException as error:
        row.cancelled = True
        raise_request_error(error, "messages", reasons=service.reasons)
        raise
    options = request.stream_options
    events = exchange.events(usage=bool(options and options.include_usage))
    return StreamingResponse(events, media_type="text/event-stream")


async def answer_job(service: Service, request: ChatRequest, facts: dict[str, Any]) -> AnswerJob:
    """What is asked of a model, with the row and the ticket of its answer.

    Raises:
        RequestError: it cannot be answered.
    """
    service.require_model(request.model)
    deadline = service.deadline()
    if len(request.messages) > service.limits.messages:
        raise too_large("messages", service.limits.messages, "messages")
    files = await service.files(picture_urls(request.messages))
    origin = origin_of(facts["id"], files)
    prompt = await service.in_thread(partial(_encoded, service, request, files))
    row = Row(_choosing(service, request, prompt), deadline, service.engine.decode)
    facts |= {"pictures": prompt.pictures, "prompt_tokens": len(prompt.input_ids)}
    return AnswerJob(prompt, row, Ticket(streams=bool(request.stream)), origin)


def _encoded(service: Service, request: ChatRequest, files: list[File]) -> EncodedPrompt:
    return service.encoder.encode(request, open_pictures(files, service.limits))


def _choosing(service: Service, request: ChatRequest, prompt: EncodedPrompt) -> Choosing:
    asked = request.max_completion_tokens or request.max_tokens
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Choosing(
        new_tokens=service.encoder.room(prompt, asked, service.limits),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        seed=request.seed,
        stop=tuple(stop),
    )
