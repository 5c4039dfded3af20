"""The engine behind a gateway."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import anyio
import httpx2
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from vqguard.errors import ConfigError
from vqguard.recipes.serving.wire.refusals import RequestError
from vqguard.recipes.serving.wire.replies import server_event

log = logging.getLogger(__name__)
_CONNECT_SECONDS = 5.0
_LIST_SECONDS = 10.0
_LISTS = 4
"""Lists of models that are asked for at a time."""
_MOST = 64 * 2**20
"""Bytes of an answer."""
_JSON, _EVENTS = "application/json", "text/event-stream"
_KEPT = ("content-encoding", "retry-after")
"""Headers of the engine's answer that the client is told, beside its type."""


class Upstream:
    """Sends what was judged to one address, and hands its answers back as they come."""

    def __init__(
        self, url: str, seconds: float, key: str | None = None, *, most_waiting: int = 2**28
    ) -> None:
        """`url` ends before `/v1`; `key` stands in for the client's, whose own is sent otherwise.

        `most_waiting`: bytes of all requests together that the engine has not begun to answer.

        Raises:
            ConfigError: not an address, or not a key.
        """
        self.url = _address(url)
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("the upstream's key: expected printable ASCII, got something else")
        self._key = key
        self._most_waiting = most_waiting
        self._waiting = 0
        self._lists = 0
        timeout = httpx2.Timeout(seconds, connect=_CONNECT_SECONDS)
        # no proxy and no .netrc of the environment: it goes where the operator said
        self._client = httpx2.AsyncClient(
            timeout=timeout,
            limits=httpx2.Limits(max_connections=None),  # the door says how many requests there are
            trust_env=False,
            follow_redirects=False,
        )

    async def ask(
        self, path: str, content: bytes, authorization: str | None, told: Mapping[str, str]
    ) -> Response:
        """The engine's answer to a POST of JSON, whatever its status.

        `told` are headers beside its own.

        Raises:
            RequestError: 502 where it gives none, 504 where it takes too long, 429 where too much
                waits for it.
        """
        if self._waiting + len(content) > self._most_waiting:
            raise _busy()
        size = len(content)
        self._waiting += size
        try:
            headers = {"Content-Type": _JSON, "Content-Length": str(size)}
            request = self._client.build_request(
                "POST", self.url + path, headers=headers, content=_once([content])
            )
            del content  # a picture may be large, and an answer long
            return await self._send(request, authorization, told)
        finally:
            self._waiting -= size

    async def list(self, path: str, authorization: str | None, told: Mapping[str, str]) -> Response:
        """The engine's answer to a GET. Raises as `ask` does."""
        if self._lists >= _LISTS:
            raise _busy()
        self._lists += 1
        try:
            request = self._client.build_request("GET", self.url + path)
            with anyio.fail_after(_LIST_SECONDS):
                return await self._send(request, authorization, told)
        except TimeoutError as error:
            raise _slow() from error
        finally:
            self._lists -= 1

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def _send(
        self, request: httpx2.Request, authorization: str | None, told: Mapping[str, str]
    ) -> Response:
        request.headers["Accept-Encoding"] = "identity"
        key = authorization if self._key is None else f"Bearer {self._key}"
        if key is not None:  # in the bytes in which it came
            request.headers = httpx2.Headers(
                [*request.headers.raw, (b"Authorization", key.encode("latin-1"))]
            )
        try:
            answer = await self._client.send(request, stream=True)
        except httpx2.TimeoutException as error:
            raise _slow() from error
        except httpx2.HTTPError as error:
            raise _failed(f"the engine cannot be reached ({type(error).__name__})") from error
        headers = {name: answer.headers[name] for name in _KEPT if name in answer.headers}
        kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == _EVENTS and answer.is_success:
            return _Stream(answer, {**headers, **told})
        try:
            return await _whole(answer, kind, {**headers, **told})
        finally:
            await answer.aclose()


class _Stream(StreamingResponse):
    """A stream of the engine's, which is let go however this ends: the client may have left."""

    def __init__(self, answer: httpx2.Response, headers: dict[str, str]) -> None:
        super().__init__(_events(answer), answer.status_code, {"content-type": _EVENTS, **headers})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._answer.aclose()


async def _whole(answer: httpx2.Response, kind: str, headers: dict[str, str]) -> Response:
    """An answer that is read to its end before a byte of it is handed on."""
    status = answer.status_code
    if 300 <= status < 400:
        raise _failed(f"the engine answered with status {status}")
    if kind != _JSON:
        said = f"the engine answered with status {status} and {kind[:80] or 'no type'!r}, no JSON"
        raise _failed(said, status if status >= 400 else 502)
    try:
        content = b"".join([piece async for piece in _bounded(answer)])
    except httpx2.TimeoutException as error:
        raise _slow() from error
    except httpx2.HTTPError as error:
        raise _failed(f"the engine's answer broke off ({type(error).__name__})") from error
    return Response(content, status, headers, media_type=_JSON)


async def _events(answer: httpx2.Response) -> AsyncIterator[bytes]:
    """A stream's bytes as they come; where it breaks, an event says so and no mark ends it."""
    problem: RequestError | None = None
    try:
        async for piece in _bounded(answer):
            yield piece
    except httpx2.TimeoutException:
        problem = _slow()
    except httpx2.HTTPError as error:
        problem = _failed(f"the engine's answer broke off ({type(error).__name__})")
    except RequestError as error:
        problem = error
    if problem is not None:
        log.warning("in the middle of a stream: %s", problem)
        yield f"\n\n{server_event(problem.body())}".encode()


async def _bounded(answer: httpx2.Response) -> AsyncIterator[bytes]:
    left = _MOST
    async for piece in answer.aiter_raw():
        left -= len(piece)
        if left < 0:
            raise _failed(f"the engine's answer is larger than {_MOST:,} bytes")
        yield piece


async def _once(content: list[bytes]) -> AsyncIterator[bytes]:
    """A body that is kept no longer than until it is sent."""
    yield content.pop()


def _address(url: str) -> str:
    """An upstream's address without its end. Raises ConfigError."""
    example = "expected an upstream such as http://127.0.0.1:8001"
    if not url.isprintable() or " " in url:
        raise ConfigError(f"{example}, got {url!r}")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{example}, got one with {error}") from error
    if parts.username is not None or parts.password is not None:
        raise ConfigError(f"{example}: a key is told by VQGUARD_UPSTREAM_KEY, not in the address")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ConfigError(f"{example}, got {url!r}")
    if parts.query or parts.fragment:
        raise ConfigError(f"{example}, without ? and #, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def _failed(said: str, status: int = 502) -> RequestError:
    return RequestError(status, said, code="upstream")


def _slow() -> RequestError:
    return RequestError(504, "the engine took too long", code="upstream_timeout")


def _busy() -> RequestError:
    return RequestError(
        429, "too much waits for the engine; try again later", code="overloaded", retry_after=5
    )
