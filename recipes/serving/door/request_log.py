"""One line of JSON a request: when, which, how long, what came of it. No texts, no pictures."""

from __future__ import annotations

import json
import logging
import time
import traceback
import uuid
from typing import Any

from vqguard.recipes.serving.door.admission import App, Message, Receive, Scope, Send
from vqguard.recipes.serving.metrics import Metrics

log = logging.getLogger(__name__)
FACTS = "vqguard.facts"
"""Where a request's handler puts what the line says beside the usual: numbers and names."""


class RequestLog:
    """Gives each request its id, and writes its line when it has ended."""

    def __init__(self, app: App, metrics: Metrics, paths: frozenset[str]) -> None:
        """`paths` are named in the metrics; all others are counted as one."""
        self.app = app
        self.metrics = metrics
        self.paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.monotonic()
        facts: dict[str, Any] = {"id": uuid.uuid4().hex}
        scope[FACTS] = facts
        status = 499  # nginx's number for a client that left

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", facts["id"].encode()),
                ]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # a bug: who asked was told so
            status = 500
            log_bug(facts["id"], error)
        finally:
            seconds = time.monotonic() - started
            path = scope["path"] if scope["path"] in self.paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(seconds)
            line = {
                "time": round(time.time(), 3),
                "event": "request",
                **facts,
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(seconds, 4),
            }
            log.info(json.dumps(line))


def log_bug(request: str, error: Exception) -> None:
    """Write down an error's class and place; its text may quote the request, so it is left out."""
    frames = traceback.format_tb(error.__traceback__)
    log.error("request %s: %s\n%s", request, type(error).__name__, "".join(frames[-3:]))
