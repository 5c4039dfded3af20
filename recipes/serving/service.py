"""What all routes share: a model in its thread, its prompts, pictures, limits and counters."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import anyio
from anyio.to_thread import run_sync
from PIL import Image

from vqguard.errors import FlaggedImageError
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.answering.engine import Engine
from vqguard.recipes.serving.answering.prompts import PromptEncoder
from vqguard.recipes.serving.audit import AuditLog
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.metrics import Metrics
from vqguard.recipes.serving.pictures import File, data_uri_bytes, is_data_uri
from vqguard.recipes.serving.wire.refusals import RequestError, bad_request, too_large

T = TypeVar("T")
_THREADS = 2
"""Requests whose pictures are decoded at a time."""
_SIDE = 64  # pixels


class Service:
    """One guarded model, and what its routes need."""

    def __init__(
        self,
        run: LoadedRun,
        name: str,
        limits: Limits,
        *,
        reasons: bool = True,
        fetch: Callable[[str, str], Awaitable[bytes]] | None = None,
        answers: bool = True,
        audit: AuditLog | None = None,
        shadow: bool = False,
    ) -> None:
        """Answers or judges once, so that the first request does not wait for what is loaded late.

        Args:
            run: the model.
            name: what clients call it.
            limits: what a request may ask for.
            reasons: whether clients are told why a picture is flagged.
            fetch: `fetch(url, param)` gets a picture that is not in the request; None: there are
                none.
            answers: whether the model will answer; else it judges only.
            audit: where verdicts are written down.
            shadow: whether pictures are judged and nothing is done about them.

        Raises:
            ArtefactError: the run has no safety map.
        """
        run.require_language_model()
        self.run = run
        self.name = name
        self.limits = limits
        self.reasons = reasons
        self.created = int(time.time())
        self.metrics = Metrics()
        self.audit = audit
        self.shadow = shadow
        self.engine = Engine(run, limits.batch, self.metrics, audit=audit, shadow=shadow)
        self.encoder = PromptEncoder(run.model, run.processor, limits)
        self._fetch = fetch
        self._threads = anyio.CapacityLimiter(_THREADS)
        grey = Image.new("RGB", (_SIDE, _SIDE), "grey")
        with suppress(FlaggedImageError):
            run.screen_images([grey])
            if answers:
                run.ask(grey, "What is this?", max_new_tokens=2)

    async def stop(self) -> None:
        """End the model's thread; what waits for it is done first."""
        await run_sync(self.engine.stop)

    def deadline(self) -> float:
        """When a request that arrives now must have ended, by `time.monotonic`."""
        return time.monotonic() + self.limits.seconds

    def require_model(self, name: str) -> None:
        """Raise RequestError, 404, for any model but the one that is served."""
        if name != self.name:
            raise RequestError(
                404,
                f"expected the model {self.name!r}, got {name[:80]!r}; /v1/models lists what is "
                "served",
                code="model_not_found",
                param="model",
            )

    async def files(self, urls: Sequence[tuple[str, str]]) -> list[File]:
        """The pictures at these addresses: what messages call each, and its address.

        Raises:
            RequestError: 400 or 413 naming the picture.
        """
        if len(urls) > self.limits.pictures:
            raise too_large("pictures", self.limits.pictures, urls[self.limits.pictures][0])
        files = []
        left = self.limits.body_bytes
        for param, url in urls:
            if is_data_uri(url):
                content = await self.in_thread(partial(data_uri_bytes, url, param))
            elif self._fetch is not None:
                content = await self._fetch(url, param)
            else:
                raise bad_request(
                    "expected data:image/…;base64,…: this server fetches no pictures from "
                    "elsewhere",
                    "invalid_image_url",
                    param,
                )
            left -= len(content)
            if left < 0:
                raise too_large("bytes of all pictures", self.limits.body_bytes, param)
            files.append((param, content))
        return files

    async def in_thread(self, function: Callable[[], T]) -> T:
        """What a function gives that would hold up the event loop."""
        return await run_sync(function, limiter=self._threads)
