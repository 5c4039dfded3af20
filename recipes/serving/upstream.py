"""The engine behind a gateway."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
from starlette.responses import Response, StreamingResponse

from vqguard.errors import ConfigError
from vqguard.recipes.serving.wire.refusals import RequestError

_CONNECT_SECONDS = 5.0
_KEPT = ("content-type", "content-encoding", "retry-after")
"""Headers of the engine's answer that the client is told."""


class Upstream:
    """Sends what was judged to one address, and hands its answers back as they come."""

    def __init__(self, url: str, seconds: float, key: str | None = None) -> None:
        """`url` ends before `/v1`; `key` stands in for the client's, whose own is sent otherwise.

        Raises:
            ConfigError: not an address.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ConfigError(f"expected an upstream such as http://127.0.0.1:8001, got {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._key = key
        timeout = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS)
        # no proxy and no .netrc of the environment: it goes where the operator said
        self._client = httpx2.AsyncClient(timeout=timeout, trust_env=False, follow_redirects=False)

    async def send(
        self, method: str, path: str, body: Any, authorization: str | None, told: dict[str, str]
    ) -> Response:
        """The engine's answer, whatever its status; `told` are headers beside its own.

        Raises:
            RequestError: 502 where it gives none, 504 where it takes too long.
        """
        headers = {"Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        elif authorization is not None:
            headers["Authorization"] = authorization
        content = None if body is None else json.dumps(body).encode()
        request = self._client.build_request(
            method, self.url + path, headers=headers, content=content
        )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx2.TimeoutException as error:
            raise RequestError(504, "the engine took too long", code="upstream_timeout") from error
        except httpx2.HTTPError as error:
            raise RequestError(
                502, f"the engine cannot be reached ({type(error).__name__})", code="upstream"
            ) from error
        if answer.is_redirect:
            await answer.aclose()
            raise RequestError(502, "the engine answered with a redirect", code="upstream")
        kept = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
        return StreamingResponse(_pieces(answer), answer.status_code, headers={**kept, **told})

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


async def _pieces(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """The answer's bytes; the engine is let go when the client leaves."""
    try:
        async for piece in answer.aiter_raw():
            yield piece
    finally:
        await answer.aclose()
