"""The door: how many requests are let in, and how much of a body is read.

Pure ASGI: what comes behind it can still see a client leave.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import anyio

from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.metrics import Metrics
from vqguard.recipes.serving.wire.refusals import RequestError, too_large

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_GRACE = 10.0
"""Seconds, behind a request's limit, that a client has to read the end of its answer."""
_LONGEST_WAIT = 60


class _LeftError(Exception):
    """The client went away before its request was whole."""


@dataclass
class _Held:
    """How many bytes of a body are in memory."""

    size: int = 0


class Admission:
    """Lets requests with a body in, one by one, while there is room."""

    def __init__(self, app: App, limits: Limits, metrics: Metrics) -> None:
        self.app = app
        self.limits = limits
        self.metrics = metrics
        self._served = 0
        self._bytes = 0
        self._usual = 1.0
        """How long a request takes, in seconds: a moving mean."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or say why not."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        if self._served >= self.limits.requests:
            await self._refuse(self._overloaded(), send)
            return
        self._served += 1
        self.metrics.served.set(self._served)
        started = time.monotonic()
        try:
            await self._serve(scope, receive, send)
        finally:
            self._served -= 1
            self.metrics.served.set(self._served)
            self._usual += 0.1 * (time.monotonic() - started - self._usual)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        held = _Held()
        began = False

        async def watched(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            body = await self._body(scope, receive, held)
            with anyio.fail_after(self.limits.seconds + _GRACE):
                await self.app(scope, _again(body, receive), watched)
        except _LeftError:
            return
        except RequestError as error:
            await self._refuse(error, send)
        except TimeoutError:
            # Behind the first byte there is nothing to say: the connection is closed.
            if not began:
                await self._refuse(
                    RequestError(503, "took too long", code="timeout", retry_after=10), send
                )
        finally:
            self._bytes -= held.size

    async def _body(self, scope: Scope, receive: Receive, held: _Held) -> bytes:
        """The request's body, of bounded size and time; `held` says how much of it there is."""
        for name, value in scope["headers"]:
            if (
                name == b"content-length"
                and value.isdigit()
                and (len(value) > 18 or int(value) > self.limits.body_bytes)
            ):
                raise too_large("bytes of the body", self.limits.body_bytes)
        pieces: list[bytes] = []
        try:
            with anyio.fail_after(self.limits.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _LeftError
                    piece = message.get("body", b"")
                    held.size += len(piece)
                    self._bytes += len(piece)
                    if held.size > self.limits.body_bytes:
                        raise too_large("bytes of the body", self.limits.body_bytes)
                    if self._bytes > self.limits.waiting_bytes:
                        raise self._overloaded()
                    pieces.append(piece)
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError(
                408,
                f"the body had not arrived after {self.limits.body_seconds:g} seconds",
                code="timeout",
            ) from error
        return b"".join(pieces)

    def _overloaded(self) -> RequestError:
        self.metrics.shed.inc()
        wait = min(_LONGEST_WAIT, max(1, math.ceil(self._usual)))
        return RequestError(
            429, "too many requests wait; try again later", code="overloaded", retry_after=wait
        )

    async def _refuse(self, error: RequestError, send: Send) -> None:
        content = json.dumps(error.body()).encode()
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **error.headers(),
        }
        await send(
            {
                "type": "http.response.start",
                "status": error.status,
                "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
            }
        )
        await send({"type": "http.response.body", "body": content})


def _again(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever else comes: the client's leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
