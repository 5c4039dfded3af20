"""An answer on its way out: whole, or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vqguard.recipes.serving.answering.rows import Row
from vqguard.recipes.serving.answering.streaming import SafeText
from vqguard.recipes.serving.answering.tickets import Ticket
from vqguard.recipes.serving.door.request_log import log_bug
from vqguard.recipes.serving.wire.refusals import RequestError
from vqguard.recipes.serving.wire.replies import (
    ChatReply,
    Choice,
    Chunk,
    ChunkChoice,
    Delta,
    FinishReason,
    GuardReply,
    Message,
    Usage,
    guard_reply,
    server_event,
)


@dataclass(frozen=True)
class Terms:
    """What an answer says beside its text."""

    model: str
    reasons: bool
    """Whether the client is told why a picture is flagged."""
    prompt_tokens: int


class Exchange:
    """One answer on its way out."""

    def __init__(self, terms: Terms, row: Row, ticket: Ticket[Row], facts: dict[str, Any]) -> None:
        self.terms = terms
        self.row = row
        self.ticket = ticket
        self.facts = facts
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def reply(self) -> dict[str, Any]:
        """The whole answer."""
        self._note()
        message = Message(content=self.row.text())
        return ChatReply(
            id=self.id,
            created=self.created,
            model=self.terms.model,
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
        except Exception as error:
            # The status was sent long ago: the stream says it, and ends without its mark.
            log_bug(self.facts["id"], error)
            failed = RequestError(500, "the server failed", code="internal")
            yield server_event(failed.body())
        finally:
            row.cancelled = True

    def _chunk(self, delta: Delta, reason: FinishReason | None = None) -> Chunk:
        choices = [ChunkChoice(delta=delta, finish_reason=reason)]
        return Chunk(id=self.id, created=self.created, model=self.terms.model, choices=choices)

    def _ending(self) -> FinishReason:
        if self.row.refused:
            return "content_filter"
        return self.row.end or "stop"

    def _usage(self) -> Usage:
        new = len(self.row.tokens)
        return Usage(
            prompt_tokens=self.terms.prompt_tokens,
            completion_tokens=new,
            total_tokens=self.terms.prompt_tokens + new,
        )

    def _guard(self) -> GuardReply:
        return guard_reply(self.row.verdicts, self.row.map_version, reasons=self.terms.reasons)

    def _note(self) -> None:
        self.facts["answer_tokens"] = len(self.row.tokens)
        self.facts["flagged"] = sum(verdict.flagged for verdict in self.row.verdicts)
