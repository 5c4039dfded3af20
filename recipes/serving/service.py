"""What is done for each request, between the routes and the model's thread."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import anyio
import torch
from anyio.to_thread import run_sync
from starlette.responses import JSONResponse, Response, StreamingResponse

from vqguard.errors import BypassError, FlaggedImageError, InputError
from vqguard.judging.verdict import Reason
from vqguard.recipes.image_batches import pixel_inputs
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.admission import Receive
from vqguard.recipes.serving.engine import AnswerJob, Engine, ScreenJob, Screened
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.metrics import Metrics
from vqguard.recipes.serving.pictures import data_uri_bytes, is_data_uri, open_pictures
from vqguard.recipes.serving.prompts import EncodedPrompt, PromptEncoder, picture_urls
from vqguard.recipes.serving.refusals import RequestError, bad_request, too_large
from vqguard.recipes.serving.replies import (
    ChatReply,
    Choice,
    Chunk,
    ChunkChoice,
    Delta,
    FinishReason,
    Message,
    ModerationReply,
    ModerationResult,
    Usage,
    guard_reply,
    server_event,
)
from vqguard.recipes.serving.rows import Choosing, Row
from vqguard.recipes.serving.schema import ChatRequest, ImagePart, ModerationRequest
from vqguard.recipes.serving.streaming import SafeText
from vqguard.recipes.serving.tickets import Ticket

T = TypeVar("T")
Facts = dict[str, Any]
_CPU = torch.device("cpu")
_THREADS = 2
"""Requests whose pictures are decoded at a time."""


class Service:
    """One guarded model, answered for."""

    def __init__(
        self,
        run: LoadedRun,
        name: str,
        limits: Limits,
        *,
        reasons: bool = True,
        fetch: Callable[[str, str], Awaitable[bytes]] | None = None,
    ) -> None:
        """`fetch(url, param)` gets a picture that is not in the request; None: there are none.

        Raises:
            ArtefactError: the run has no safety map.
        """
        self.run = run
        self.name = name
        self.limits = limits
        self.reasons = reasons
        self.created = int(time.time())
        self.metrics = Metrics()
        self.engine = Engine(run, limits.batch, self.metrics)
        self.engine.safety_map  # noqa: B018 - there must be one
        self.encoder = PromptEncoder(run.model, run.processor, limits)
        self._fetch = fetch
        self._threads = anyio.CapacityLimiter(_THREADS)

    async def stop(self) -> None:
        """End the model's thread; what waits for it is done first."""
        await run_sync(self.engine.stop)

    def require_model(self, name: str | None) -> None:
        """Raise RequestError, 404, for any model but the one that is served."""
        if name != self.name:
            raise RequestError(
                404,
                f"expected the model {self.name!r}, got {str(name)[:80]!r}; /v1/models lists what "
                "is served",
                code="model_not_found",
                param="model",
            )

    async def chat(self, request: ChatRequest, receive: Receive, facts: Facts) -> Response:
        """Answer a conversation."""
        self.require_model(request.model)
        deadline = time.monotonic() + self.limits.seconds
        if len(request.messages) > self.limits.messages:
            raise too_large("messages", self.limits.messages, "messages")
        files = await self._files(picture_urls(request))
        prompt = await self._in_thread(partial(self._encode, request, files))
        del files
        row = Row(self._choosing(request, prompt), deadline, self.engine.decode)
        ticket: Ticket[Row] = Ticket(streams=bool(request.stream))
        facts |= {"pictures": prompt.pictures, "prompt_tokens": len(prompt.input_ids)}
        self.engine.submit(AnswerJob(prompt, row, ticket))
        exchange = _Exchange(self, row, ticket, len(prompt.input_ids), facts)
        try:
            if not request.stream:
                await _unless_left(ticket.result(), receive)
                return JSONResponse(exchange.reply())
            # Until the first token is there the answer can still be an error.
            await _unless_left(ticket.started(), receive)
        except _LeftError:
            row.cancelled = True
            return Response(status_code=499)
        except BaseException as error:
            row.cancelled = True
            raise_request_error(error)
            raise
        options = request.stream_options
        events = exchange.events(usage=bool(options and options.include_usage))
        return StreamingResponse(events, media_type="text/event-stream")

    async def moderate(
        self, request: ModerationRequest, receive: Receive, facts: Facts
    ) -> ModerationReply:
        """Judge the pictures of a request; texts are not judged."""
        if request.model is not None and not request.model.startswith("omni-moderation"):
            self.require_model(request.model)
        given = request.input
        texts = 1 if isinstance(given, str) else len(given)
        if texts > self.limits.messages or not texts:
            raise too_large("inputs", self.limits.messages, "input")
        urls = [
            (f"input.{place}", part.image_url.url)
            for place, part in enumerate([] if isinstance(given, str) else given)
            if isinstance(part, ImagePart)
        ]
        facts["pictures"] = len(urls)
        if not urls:
            results = 1 if isinstance(given, str) or not isinstance(given[0], str) else len(given)
            nothing = Screened([], self.engine.safety_map.version)
            return self._moderation([nothing] * results)
        files = await self._files(urls)
        inputs = await self._in_thread(partial(self._pixels, files))
        ticket: Ticket[Screened] = Ticket()
        job = ScreenJob(inputs, len(files), ticket, time.monotonic() + self.limits.seconds)
        self.engine.submit(job)
        try:
            screened = await _unless_left(ticket.result(), receive)
        except _LeftError as error:
            job.cancelled = True
            raise RequestError(499, "the client left", code="left") from error
        except BaseException as error:
            job.cancelled = True
            raise_request_error(error)
            raise
        facts["flagged"] = sum(verdict.flagged for verdict in screened.verdicts)
        return self._moderation([screened])

    def _moderation(self, screened: Sequence[Screened]) -> ModerationReply:
        return ModerationReply(
            id=_new_id("modr"),
            model=self.name,
            results=[self._moderated(each) for each in screened],
        )

    def _moderated(self, screened: Screened) -> ModerationResult:
        known = self.engine.safety_map.categories
        flagged = {v.category: v.probability for v in screened.verdicts if v.reason is not None}
        names = sorted({*known, *flagged})
        return ModerationResult(
            flagged=any(verdict.flagged for verdict in screened.verdicts),
            categories={name: name in flagged for name in names},
            category_scores={
                name: flagged.get(name, 0.0) if self.reasons else float(name in flagged)
                for name in names
            },
            category_applied_input_types={
                name: ["image"] if screened.verdicts else [] for name in names
            },
            guard=guard_reply(screened.verdicts, screened.map_version, reasons=self.reasons),
        )

    async def _files(self, urls: Sequence[tuple[str, str]]) -> list[tuple[str, bytes]]:
        if len(urls) > self.limits.pictures:
            raise too_large("pictures", self.limits.pictures, urls[self.limits.pictures][0])
        files = []
        for param, url in urls:
            if is_data_uri(url):
                content = await self._in_thread(partial(data_uri_bytes, url, param))
            elif self._fetch is not None:
                content = await self._fetch(url, param)
            else:
                raise bad_request(
                    "expected data:image/…;base64,…: this server fetches no pictures from "
                    "elsewhere",
                    "invalid_image_url",
                    param,
                )
            files.append((param, content))
        return files

    def _encode(self, request: ChatRequest, files: list[tuple[str, bytes]]) -> EncodedPrompt:
        return self.encoder.encode(request, open_pictures(files, self.limits))

    def _pixels(self, files: list[tuple[str, bytes]]) -> dict[str, Any]:
        pictures = open_pictures(files, self.limits)
        with self.encoder.lock:
            return pixel_inputs(self.run.processor, pictures, _CPU)

    def _choosing(self, request: ChatRequest, prompt: EncodedPrompt) -> Choosing:
        asked = request.max_completion_tokens or request.max_tokens
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        return Choosing(
            new_tokens=self.encoder.room(prompt, asked, self.limits),
            temperature=request.temperature or 0.0,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=request.seed,
            stop=tuple(stop),
        )

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await run_sync(function, limiter=self._threads)


class _Exchange:
    """One answer on its way out."""

    def __init__(
        self, service: Service, row: Row, ticket: Ticket[Row], prompt_tokens: int, facts: Facts
    ) -> None:
        self.service = service
        self.row = row
        self.ticket = ticket
        self.prompt_tokens = prompt_tokens
        self.facts = facts
        self.id = _new_id("chatcmpl")
        self.created = int(time.time())

    def reply(self) -> dict[str, Any]:
        """The whole answer."""
        self._note()
        message = Message(content=self.row.text())
        return ChatReply(
            id=self.id,
            created=self.created,
            model=self.service.name,
            choices=[Choice(message=message, finish_reason=self._ending())],
            usage=self._usage(),
            guard=self._guard(),
        ).model_dump(mode="json")

    async def events(self, *, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        row = self.row
        try:
            yield self._chunk(Delta(role="assistant", content="")).event()
            safe = SafeText(row.decode, row.choosing.stop)
            async for token in self.ticket.tokens():
                if piece := safe.add(token):
                    yield self._chunk(Delta(content=piece)).event()
            await self.ticket.result()
            if piece := safe.rest(row.text()):
                yield self._chunk(Delta(content=piece)).event()
            self._note()
            last = self._chunk(Delta(), self._ending())
            last.guard = self._guard()
            yield last.event()
            if usage:
                end = self._chunk(Delta())
                end.choices, end.usage = [], self._usage()
                yield end.event()
            yield server_event("[DONE]")
        except Exception:
            # The status was sent long ago: the stream says it, and ends without its mark.
            failed = RequestError(500, "the server failed", code="internal")
            yield server_event(failed.body())
            raise
        finally:
            row.cancelled = True

    def _chunk(self, delta: Delta, reason: FinishReason | None = None) -> Chunk:
        choices = [ChunkChoice(delta=delta, finish_reason=reason)]
        return Chunk(id=self.id, created=self.created, model=self.service.name, choices=choices)

    def _ending(self) -> FinishReason:
        if self.row.refused:
            return "content_filter"
        return self.row.end or "stop"

    def _usage(self) -> Usage:
        new = len(self.row.tokens)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=new,
            total_tokens=self.prompt_tokens + new,
        )

    def _guard(self) -> Any:
        return guard_reply(self.row.verdicts, self.row.map_version, reasons=self.service.reasons)

    def _note(self) -> None:
        self.facts["answer_tokens"] = len(self.row.tokens)
        self.facts["flagged"] = sum(verdict.flagged for verdict in self.row.verdicts)


class _LeftError(Exception):
    """The client went away."""


async def _unless_left(wanted: Awaitable[T], receive: Receive) -> T:
    """The result, or `_LeftError` as soon as the client has gone."""
    waiting = asyncio.ensure_future(wanted)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise _LeftError
        return waiting.result()
    finally:
        leaving.cancel()
        waiting.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def raise_request_error(error: BaseException) -> None:
    """Raise what a client is told of an error of the model that is about its request.

    Raises:
        RequestError: 400; nothing is raised for errors of another kind.
    """
    if isinstance(error, FlaggedImageError):
        reasons = [reason for reason in error.reasons if isinstance(reason, Reason)]
        raise RequestError(
            400,
            "the request shows a picture whose policy is an error",
            code="content_filter",
            param="messages",
            guard={"categories": [reason.category for reason in reasons]},
        ) from error
    if isinstance(error, InputError | BypassError):
        raise bad_request(str(error), param="messages") from error


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"
