"""Waiting for something only as long as the client waits."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from vqguard.recipes.serving.door.admission import Receive

T = TypeVar("T")
LEFT = 499
"""nginx's status for a client that left; nobody reads it but the log."""


class LeftError(Exception):
    """The client went away."""


async def unless_left(wanted: Awaitable[T], receive: Receive) -> T:
    """The result, or `LeftError` as soon as the client has gone."""
    waiting = asyncio.ensure_future(wanted)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({waiting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            raise LeftError
        return waiting.result()
    finally:
        leaving.cancel()
        waiting.cancel()


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
