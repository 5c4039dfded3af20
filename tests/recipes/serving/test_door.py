"""Who is let in, and what happens to those who are slow, too many, or gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.answering.engine import Engine
from vqguard.recipes.serving.app import make_app
from vqguard.recipes.serving.door.admission import Admission, Message, Receive, Scope, Send
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.metrics import Metrics
from vqguard.recipes.serving.service import Service

from .conftest import CHAT, NAME, PICTURES, Serve, asking, service_of

Sent = list[Message]


def scope(length: int | None = None) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": headers,
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "root_path": "",
    }


def body_of(*pieces: bytes, then: Callable[[], Awaitable[Message]] | None = None) -> Receive:
    """What a client sends, piece by piece; `then` gives what comes after."""
    left = list(pieces)

    async def receive() -> Message:
        if left:
            piece = left.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(left)}
        return await (then or _silence)()

    return receive


async def _silence() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def _gone() -> Message:
    return {"type": "http.disconnect"}


def collect(sent: Sent) -> Send:
    async def send(message: Message) -> None:
        sent.append(message)

    return send


def status_of(sent: Sent) -> tuple[int, dict[bytes, bytes], Any]:
    assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


async def echo(_: Scope, receive: Receive, send: Send) -> None:
    """Answers with what it read."""
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(len(message["body"])).encode()})


def ask(door: Admission, receive: Receive, length: int | None = None) -> Any:
    async def go() -> Sent:
        sent: Sent = []
        await door(scope(length), receive, collect(sent))
        return sent

    return status_of(asyncio.run(go()))


def test_a_body_is_read_up_to_its_limit() -> None:
    door = Admission(echo, Limits(body_bytes=10), Metrics())
    assert ask(door, body_of(b"12345", b"67890"))[::2] == (200, 10)
    status, _, error = ask(door, body_of(b"12345", b"678901"))
    assert (status, error["error"]["code"]) == (413, "too_large")
    for length in (11, 10**30):
        assert ask(door, body_of(), length)[0] == 413  # nothing of it is read
    assert ask(door, body_of(b"1"), 1)[0] == 200


def test_a_slow_body_is_a_408() -> None:
    door = Admission(echo, Limits(body_seconds=0.05), Metrics())

    async def never() -> Message:
        return await _silence()

    assert ask(door, never)[0] == 408


def test_bodies_that_wait_have_a_limit_together() -> None:
    limits = Limits(waiting_bytes=15, body_bytes=10)

    async def go() -> tuple[Sent, Sent, Sent]:
        free = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await free.wait()
            await echo(scope, receive, send)

        door = Admission(slow, limits, Metrics())
        first: Sent = []
        second: Sent = []
        third: Sent = []
        waiting = asyncio.create_task(door(scope(), body_of(b"1234567890"), collect(first)))
        await asyncio.sleep(0)
        await door(scope(), body_of(b"123456"), collect(second))
        free.set()
        await waiting
        await door(scope(), body_of(b"123456"), collect(third))
        return first, second, third

    first, second, third = asyncio.run(go())
    assert status_of(first)[0] == 200
    status, headers, error = status_of(second)
    assert (status, error["error"]["type"]) == (429, "overloaded_error")
    assert int(headers[b"retry-after"]) >= 1
    assert status_of(third)[0] == 200


def test_too_many_are_sent_away(serve: Serve, run: LoadedRun) -> None:
    """And room is made when one has ended, however it has."""

    async def go() -> tuple[list[int], int]:
        free = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await free.wait()
            if scope["path"] == "/broken":
                raise ZeroDivisionError
            await echo(scope, receive, send)

        metrics = Metrics()
        door = Admission(slow, Limits(requests=2), metrics)

        async def one(path: str) -> int:
            sent: Sent = []
            try:
                await door({**scope(), "path": path}, body_of(b"{}"), collect(sent))
            except ZeroDivisionError:
                return 500
            return status_of(sent)[0]

        tasks = [asyncio.create_task(one(path)) for path in ("/", "/broken", "/", "/")]
        await asyncio.sleep(0.01)
        free.set()
        statuses = [await task for task in tasks]
        return statuses, await one("/")

    statuses, later = asyncio.run(go())
    assert statuses == [200, 500, 429, 429]
    assert later == 200


def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqguard.recipes.serving.door.admission._GRACE", 0.0)

    async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    door = Admission(stuck, Limits(seconds=0.05), Metrics())
    status, headers, _ = ask(door, body_of(b"{}"))
    assert (status, b"retry-after" in headers) == (503, True)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_the_place(run: LoadedRun, flagged: list[bool], stream: bool) -> None:
    """The row ends at its next token, and neither the line nor the door keeps anything of it."""
    clean = PICTURES[flagged.index(False)]
    service = Service(run, NAME, Limits(new_tokens=400, seconds=60))
    app = make_app(service)
    content = json.dumps(asking(clean, max_tokens=400, stream=stream)).encode()

    async def go() -> Sent:
        sent: Sent = []
        service.engine.start()
        await asyncio.wait_for(app(scope(), body_of(content, then=_gone), collect(sent)), 30)
        await service.stop()
        return sent

    sent = asyncio.run(go())
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)
    samples = {
        sample.name: sample.value
        for metric in service.metrics.registry.collect()
        for sample in metric.samples
        if not sample.labels
    }
    assert samples["vqguard_requests_served"] == 0
    assert samples["vqguard_answer_tokens_total"] < 390


def test_the_last_in_line_are_answered_before_the_thread_ends(run: LoadedRun) -> None:
    service = Service(run, NAME, Limits())
    app = make_app(service)

    async def go() -> list[Sent]:
        answers: list[Sent] = [[] for _ in range(5)]
        tasks = [
            asyncio.ensure_future(
                app(scope(), body_of(json.dumps(asking(PICTURES[n])).encode()), collect(sent))
            )
            for n, sent in enumerate(answers)
        ]
        while service.engine.waiting < len(tasks):
            await asyncio.sleep(0.01)
        service.engine.start()
        await service.stop()
        await asyncio.gather(*tasks)
        late: Sent = []
        await app(scope(), body_of(json.dumps(asking(PICTURES[0])).encode()), collect(late))
        return [*answers, late]

    *answers, late = asyncio.run(go())
    assert [status_of(sent)[0] for sent in answers] == [200] * 5
    assert status_of(late)[0] == 503


def test_health_says_when_the_model_is_gone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    client = serve()
    assert client.get("/health").json()["status"] == "ok"

    def broken(_: Engine, jobs: list[Any]) -> None:
        raise MemoryError

    monkeypatch.setattr(Engine, "_do", broken)
    answer = client.post(CHAT, json=asking(PICTURES[0]))
    assert answer.status_code == 500
    assert client.get("/health").status_code == 503
    assert client.post(CHAT, json=asking(PICTURES[0])).status_code == 503
    assert not service_of(client).engine.alive


def test_a_bug_is_a_500_without_the_request_in_the_log(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quoted = "a user's secret"

    def broken(_: Engine, jobs: list[Any]) -> None:
        raise KeyError(quoted)

    monkeypatch.setattr(Engine, "_answer", broken)
    with caplog.at_level("INFO"):
        answer = serve().post(CHAT, json=asking(PICTURES[0], question="my secret ?"))
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed"
    assert "KeyError" in caplog.text
    assert "secret" not in caplog.text
    (line,) = [json.loads(r.message) for r in caplog.records if r.message.startswith("{")]
    assert (line["status"], line["path"], line["pictures"]) == (500, CHAT, 1)
    assert line["id"] == answer.headers["x-request-id"]
