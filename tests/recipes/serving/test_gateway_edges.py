"""A gateway between clients that send what they like and an engine that fails."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from vqguard.errors import ConfigError
from vqguard.images import decode_image
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.gateway import _canonical, make_gateway
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.upstream import Upstream

from .conftest import CHAT, PICTURES, asking
from .test_contract import WAIT

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b'data: {"choices": []}\n\n'


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


class RawEngine:
    """Reads one request a connection, does what it is told with the connection, and closes it."""

    def __init__(self, act: Callable[[socket.socket], None]) -> None:
        self.act = act
        self.requests: list[tuple[bytes, bytes]] = []
        self.left = threading.Event()
        """Set when a client closed its connection before the engine did."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            read = b""
            while b"\r\n\r\n" not in read:
                read += connection.recv(65536)
            head, _, body = read.partition(b"\r\n\r\n")
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    while len(body) < int(line.partition(b":")[2]):
                        body += connection.recv(65536)
            self.requests.append((head, body))
            try:
                self.act(connection)
            except OSError:
                self.left.set()

    def wait_for_leaving(self, connection: socket.socket) -> None:
        connection.settimeout(WAIT)
        if connection.recv(1) == b"":
            self.left.set()


Gate = Callable[..., tuple[TestClient, RawEngine]]


@pytest.fixture
def gate(run: LoadedRun) -> Iterator[Gate]:
    """A gateway before an engine that does with each connection what it is told."""
    with ExitStack() as stack:

        def start(act: Callable[..., None], **limits: Any) -> tuple[TestClient, RawEngine]:
            engine = RawEngine(lambda connection: act(connection, engine))
            stack.callback(engine.close)
            bounds = Limits(**limits)
            app: Any = make_gateway(
                Service(run, "judge", bounds, answers=False),
                Upstream(engine.url, bounds.seconds, most_waiting=bounds.waiting_bytes),
            )
            client = TestClient(app, raise_server_exceptions=False)
            client.app_state["app"] = app
            stack.enter_context(client)
            return client, engine

        yield start


def say(content: bytes) -> Callable[..., None]:
    return lambda connection, _: connection.sendall(content)


def error_of(answer: httpx2.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


# -- what clients send


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not(gate: Gate, value: str) -> None:
    client, engine = gate(say(OK))
    body = json.dumps(asking(tools=[{"type": "function", "function": {"x": 0}}]))
    body = body.replace('"x": 0', f'"x": {value}')
    answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert engine.requests == []


@pytest.mark.parametrize("depth", [100, 900, 20_000])
def test_deep_json(gate: Gate, depth: int) -> None:
    client, engine = gate(say(OK))
    deep = '{"a":' * depth + "1" + "}" * depth
    body = json.dumps(asking(tools=["HERE"])).replace('"HERE"', deep)
    answer = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400), answer.text
    assert len(engine.requests) == (answer.status_code == 200)


def test_a_key_of_any_bytes(gate: Gate) -> None:
    client, engine = gate(say(OK))
    headers = {b"Authorization": "Bearer schlüssel".encode()}
    assert client.post(CHAT, json=asking(), headers=headers).status_code == 200
    head, _ = engine.requests[0]
    assert "Bearer schlüssel".encode() in head


def test_of_two_fields_of_one_name_one_is_judged_and_sent(gate: Gate, flagged: list[bool]) -> None:
    client, engine = gate(say(OK))
    clean, bad = PICTURES[flagged.index(False)], PICTURES[flagged.index(True)]
    for first, second in ((clean, bad), (bad, clean)):
        twice = json.dumps(asking(first))[:-1] + ", " + json.dumps(asking(second))[1:]
        headers = {"content-type": "application/json"}
        answer = client.post(CHAT, content=twice, headers=headers)
        assert answer.status_code == 200
        if second is bad:
            assert answer.json()["choices"][0]["finish_reason"] == "content_filter"
            assert engine.requests == []
    ((_, body),) = engine.requests
    assert body.count(b'"messages"') == 1


def test_large_pictures_wait_within_the_limit(gate: Gate, run: LoadedRun) -> None:
    """What was judged is sent as a PNG, which may be far larger than what came."""
    go_on = threading.Event()

    def wait(connection: socket.socket, _: RawEngine) -> None:
        go_on.wait(WAIT)
        connection.sendall(OK)

    rng = np.random.default_rng(0)
    for _ in range(50):
        content = io.BytesIO()
        noise = Image.fromarray(rng.integers(0, 256, (600, 600, 3), dtype=np.uint8))
        noise.save(content, "WEBP")
        noise = decode_image(content, "noise", 10**6)
        if not run.screen_images([noise])[0].flagged:
            break
    size = len(_canonical(noise))
    assert size > 3 * len(content.getvalue())
    client, engine = gate(wait, waiting_bytes=size * 3 // 2)
    clean = asking()
    url = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
    clean["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    answers: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.post(CHAT, json=clean)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    until = time.monotonic() + WAIT
    while len(answers) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 429, 429]
    assert all("retry-after" in a.headers for a in answers if a.status_code == 429)
    assert client.post(CHAT, json=clean).status_code == 200
    assert len(engine.requests) == 2


# -- what the engine does


def test_a_stream_that_breaks_off_says_so(gate: Gate) -> None:
    client, _ = gate(say(EVENTS + chunk(EVENT)))
    answer = client.post(CHAT, json=asking(stream=True))
    events = [line for line in answer.text.split("\n\n") if line]
    assert events[0] == EVENT.decode().strip()
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "upstream"
    assert "[DONE]" not in answer.text


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 502),
        (b"garbage\r\n\r\n", 502),
        (OK[:-2].replace(b": 2", b": 20") + b"{}", 502),  # breaks off
        (OK.replace(b"200 OK", b"500 No"), 500),
        (OK.replace(b"200 OK", b"503 Busy"), 503),
        (OK.replace(b"200 OK", b"304 Same").replace(b": 2", b": 0")[:-2], 502),
        (OK.replace(b"application/json", b"text/html"), 502),
        (OK.replace(b"200 OK", b"503 No").replace(b"application/json", b"text/html"), 503),
        (OK.replace(b": 2", b": 999999999999"), 502),
    ],
)
def test_answers_that_are_none(gate: Gate, content: bytes, status: int) -> None:
    """What the client gets is JSON, whatever the engine said."""
    client, _ = gate(say(content))
    answer = client.post(CHAT, json=asking())
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    if status == 502 or b"html" in content:
        assert answer.json()["error"]["code"] == "upstream"


@pytest.mark.parametrize("stream", [True, False])
def test_an_endless_answer_ends(gate: Gate, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqguard.recipes.serving.upstream._MOST", 100_000)
    start = EVENTS if stream else EVENTS.replace(b"text/event-stream", b"application/json")

    def pour(connection: socket.socket, _: RawEngine) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(chunk(EVENT * 400))

    client, engine = gate(pour)
    answer = client.post(CHAT, json=asking(stream=stream))
    assert engine.left.wait(WAIT)
    if stream:
        assert '"code": "upstream"' in answer.text
        assert len(answer.content) < 200_000
    else:
        assert error_of(answer) == (502, "upstream")


def test_an_engine_that_says_nothing(gate: Gate) -> None:
    client, engine = gate(lambda connection, engine: engine.wait_for_leaving(connection), seconds=1)
    assert error_of(client.post(CHAT, json=asking())) == (504, "upstream_timeout")
    assert engine.left.wait(WAIT)


def test_lists_of_models_are_bounded(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list takes seconds at most, and many that ask for it do not use up the connections."""
    monkeypatch.setattr("vqguard.recipes.serving.upstream._LIST_SECONDS", 1.0)
    client, engine = gate(lambda connection, engine: engine.wait_for_leaving(connection))
    answers: list[tuple[int, str]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(error_of(client.get("/v1/models"))))
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(answers) == {(504, "upstream_timeout"), (429, "overloaded")}
    assert len(engine.requests) < 12


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_lets_the_engine_go(gate: Gate, stream: bool) -> None:
    """Before the first byte, and in the middle of a stream."""
    began = threading.Event()

    def act(connection: socket.socket, engine: RawEngine) -> None:
        if stream:
            connection.sendall(EVENTS + chunk(EVENT))
        began.set()
        engine.wait_for_leaving(connection)

    client, engine = gate(act)
    body = json.dumps(asking(stream=stream)).encode()

    async def ask_and_leave() -> None:
        given = False
        sent = asyncio.Event()

        async def receive() -> Any:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            while not began.is_set():
                await asyncio.sleep(0.02)
            if stream:
                await sent.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.set()

        scope = {
            "type": "http",
            "asgi": {"spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": CHAT,
            "raw_path": CHAT.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await client.app_state["app"](scope, receive, send)

    assert client.portal is not None
    client.portal.call(ask_and_leave)
    assert engine.left.wait(20)


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@127.0.0.1",
        "http://127.0.0.1:1/#x",
        "http://127.0.0.1:99999",
        "http://127.0.0.1/?a=b",
        "http://a b/",
        "http://127.0.0.1:1/\n",
    ],
)
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="upstream") as refused:
        Upstream(url, 1)
    assert "secret" not in str(refused.value)
