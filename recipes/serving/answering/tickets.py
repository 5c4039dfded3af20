"""What the model's thread tells a request that waits for it in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

R = TypeVar("R")


class Ticket(Generic[R]):
    """One request's place: tokens as they come, then a result or an error.

    Made in the event loop; `tell`, `finish` and `fail` are called from any thread.
    """

    def __init__(self, *, streams: bool = False) -> None:
        """`streams`: the request wants each token; without it `tell` says nothing."""
        self.streams = streams
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[int | None] = asyncio.Queue()
        self._started = asyncio.Event()
        self._result: asyncio.Future[R] = self._loop.create_future()

    def tell(self, token: int) -> None:
        """The next token of the answer."""
        if self.streams:
            self._post(self._take, token)

    def finish(self, result: R) -> None:
        """The result; what is told after the first end is dropped."""
        self._post(self._end, result, None)

    def fail(self, error: Exception) -> None:
        """The error that the request ends with."""
        self._post(self._end, None, error)

    async def result(self) -> R:
        """The result, or the error raised."""
        return await asyncio.shield(self._result)

    async def started(self) -> None:
        """Until there is a token or the end. Raises the error, if it is one that it ends with."""
        await self._started.wait()
        if self._result.done():
            self._result.result()

    async def tokens(self) -> AsyncIterator[int]:
        """The answer's tokens, until it has ended."""
        while (token := await self._tokens.get()) is not None:
            yield token

    def _take(self, token: int) -> None:
        self._tokens.put_nowait(token)
        self._started.set()

    def _end(self, result: R | None, error: Exception | None) -> None:
        if self._result.done():
            return
        if error is not None:
            self._result.set_exception(error)
            self._result.exception()  # it may be that nobody waits any more
        else:
            self._result.set_result(result)  # type: ignore[arg-type]
        self._tokens.put_nowait(None)
        self._started.set()

    def _post(self, function: object, *arguments: object) -> None:
        # The loop is closed when the server has stopped: nobody is there to be told.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]
