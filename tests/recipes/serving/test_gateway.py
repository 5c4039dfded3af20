"""`vqguard gateway`: what is judged is what is handed on, and nothing else is."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from vqguard.adapters import get_adapter
from vqguard.errors import ConfigError
from vqguard.judging.policies import Policy
from vqguard.recipes.run import LoadedRun, open_judge, save_run_model
from vqguard.recipes.serving.gateway import make_gateway
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.upstream import Upstream

from .conftest import CHAT, PICTURES, asking, data_uri

Gate = Callable[..., TestClient]
STREAM = b'data: {"choices": []}\n\ndata: [DONE]\n\n'


class Engine(BaseHTTPRequestHandler):
    """An engine that writes down what it is asked."""

    seen: list[tuple[str, dict[str, str], Any]]

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers), None))
        self._say(200, b'{"object": "list", "data": []}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, dict(self.headers), body))
        if body["model"] == "missing":
            self._say(404, b'{"error": {"message": "no such model"}}')
        elif body["model"] == "moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/")
            self.end_headers()
        elif body.get("stream"):
            self._say(200, STREAM, "text/event-stream")
        else:
            self._say(200, b'{"id": "engine\'s own"}')

    def _say(self, status: int, content: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Set-Cookie", "a=b")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], Any]]:
    requests: list[tuple[str, dict[str, str], Any]] = []
    monkeypatch.setattr(Engine, "seen", requests, raising=False)
    return requests


@pytest.fixture(scope="module")
def engine() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def gate(run: LoadedRun, engine: str, seen: list[Any]) -> Iterator[Gate]:
    with ExitStack() as stack:

        def start(url: str = engine, key: str | None = None, **limits: Any) -> TestClient:
            service = Service(run, "judge", Limits(**limits), answers=False)
            app: Any = make_gateway(service, Upstream(url, 30, key))
            client = TestClient(app, raise_server_exceptions=False)
            stack.enter_context(client)
            return client

        yield start


def picture_of(body: Any, place: int = 0) -> Image.Image:
    url = body["messages"][0]["content"][place]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_clean_pictures_are_handed_on_and_flagged_ones_are_not(
    gate: Gate, seen: list[Any], flagged: list[bool]
) -> None:
    client = gate()
    for picture, bad in zip(PICTURES, flagged, strict=True):
        seen.clear()
        answer = client.post(CHAT, json=asking(picture))
        assert answer.status_code == 200
        assert answer.headers["x-vqguard"] == "judged, not quantised"
        assert len(answer.headers["x-vqguard-map-version"]) == 64
        if bad:
            assert seen == []
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] == "content_filter"
            assert choice["message"]["content"] == "sorry ."
            assert answer.json()["guard"]["pictures"][0]["category"] == "gun"
        else:
            ((path, _, body),) = seen
            assert path == CHAT
            assert answer.json() == {"id": "engine's own"}
            assert np.array_equal(np.asarray(picture_of(body)), np.asarray(picture))
            assert "set-cookie" not in answer.headers


def test_what_was_judged_is_what_is_shown(gate: Gate, seen: list[Any], flagged: list[bool]) -> None:
    """Metadata, an orientation and what is transparent do not reach the engine."""
    clean = PICTURES[flagged.index(False)]
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    exif[0x010E] = "a name for it"
    content = io.BytesIO()
    clean.rotate(180).save(content, "PNG", exif=exif)
    url = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    body = asking(clean)
    body["messages"][0]["content"][0]["image_url"]["url"] = url
    assert gate().post(CHAT, json=body).json() == {"id": "engine's own"}
    shown = picture_of(seen[0][2])
    assert np.array_equal(np.asarray(shown), np.asarray(clean))
    assert not dict(shown.getexif())
    assert set(shown.info) <= {"dpi"}


def test_only_known_fields_are_handed_on(gate: Gate, seen: list[Any], flagged: list[bool]) -> None:
    clean = PICTURES[flagged.index(False)]
    client = gate()
    fields: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "n": 2,
        "seed": 1,
    }
    body = asking(clean, **fields)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    body["messages"] += [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    assert client.post(CHAT, json=body).status_code == 200
    handed = seen[0][2]
    handed["messages"][0]["content"][0] = body["messages"][0]["content"][0]
    assert handed == body
    seen.clear()
    for field in ("mm_processor_kwargs", "prompt_embeds", "chat_template", "extra_body"):
        assert client.post(CHAT, json={**asking(clean), field: {}}).status_code == 400
    for part in (
        {"type": "video_url", "video_url": {"url": "x"}},
        {"type": "image_embeds", "image_embeds": "x"},
        {"type": "input_audio", "input_audio": {}},
        {"type": "image_url", "image_url": {"url": data_uri(clean)}, "uuid": "1"},
    ):
        wrong = asking(clean)
        wrong["messages"][0]["content"].append(part)
        assert client.post(CHAT, json=wrong).status_code == 400
    for role in ("assistant", "system", "tool"):
        message = {"role": role, "content": asking(clean)["messages"][0]["content"]}
        wrong = {"model": "m", "messages": [message]}
        assert client.post(CHAT, json=wrong).status_code == 400
    for path in ("/v1/completions", "/v1/responses", "/v1/embeddings"):
        assert client.post(path, json={}).status_code == 404
    assert seen == []


def test_streams(gate: Gate, flagged: list[bool]) -> None:
    client = gate()
    clean, bad = PICTURES[flagged.index(False)], PICTURES[flagged.index(True)]
    answer = client.post(CHAT, json=asking(clean, stream=True))
    assert answer.content == STREAM
    assert answer.headers["content-type"] == "text/event-stream"
    options: dict[str, Any] = {"stream": True, "n": 2, "stream_options": {"include_usage": True}}
    answer = client.post(CHAT, json=asking(bad, **options))
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    said, ends, usage = map(json.loads, lines[:-1])
    assert lines[-1] == "[DONE]"
    assert [choice["delta"]["content"] for choice in said["choices"]] == ["sorry ."] * 2
    assert {choice["finish_reason"] for choice in ends["choices"]} == {"content_filter"}
    assert ends["guard"]["pictures"][0]["flagged"]
    assert usage["usage"]["total_tokens"] == 0


def test_whose_key(gate: Gate, seen: list[Any]) -> None:
    client, headers = gate(), {"Authorization": "Bearer client", "Cookie": "c=d"}
    client.post(CHAT, json=asking(), headers=headers)
    assert seen[-1][1]["Authorization"] == "Bearer client"
    assert not {"Cookie", "cookie"} & set(seen[-1][1])
    client = gate(key="operator")
    client.post(CHAT, json=asking(), headers=headers)
    assert seen[-1][1]["Authorization"] == "Bearer operator"
    assert client.get("/v1/models", headers=headers).json()["data"] == []
    assert seen[-1][1]["Authorization"] == "Bearer operator"


def test_the_engines_errors(gate: Gate) -> None:
    client = gate()
    answer = client.post(CHAT, json={**asking(), "model": "missing"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "no such model")
    moved = client.post(CHAT, json={**asking(), "model": "moved"}, follow_redirects=False)
    assert (moved.status_code, moved.json()["error"]["code"]) == (502, "upstream")
    away = gate("http://127.0.0.1:9").post(CHAT, json=asking())
    assert (away.status_code, away.json()["error"]["code"]) == (502, "upstream")
    for url in ("127.0.0.1:8000", "ftp://a", "", "http://"):
        with pytest.raises(ConfigError):
            Upstream(url, 1)


@pytest.mark.parametrize("action", ["report", "warn", "blank", "raise"])
def test_policies(
    gate: Gate, run: LoadedRun, seen: list[Any], flagged: list[bool], action: Any
) -> None:
    """What only a model of one's own can do is a refusal here."""
    safety_map = run.model.vqguard.safety_map
    policy = Policy(action, warning="Careful." if action == "warn" else "")
    run.model.vqguard.safety_map = safety_map.with_judging(policies={"gun": policy})
    answer = gate().post(CHAT, json=asking(PICTURES[flagged.index(True)]))
    assert len(seen) == (action == "report")
    if action == "raise":
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "content_filter")
        assert answer.json()["error"]["guard"]["pictures"][0]["category"] == "gun"
    elif action != "report":
        assert answer.json()["choices"][0]["finish_reason"] == "content_filter"


def test_it_judges_without_a_language_model(
    run: LoadedRun, engine: str, seen: list[Any], flagged: list[bool], tmp_path: Path
) -> None:
    save_run_model(tmp_path, run.model, run.processor)
    judge = open_judge(tmp_path)
    left, whole = (sum(p.numel() for p in m.parameters()) for m in (judge.model, run.model))
    language = get_adapter(run.model).language_modules(run.model)
    held = {parameter for module in language for parameter in module.parameters()}
    assert left == whole - sum(parameter.numel() for parameter in held)
    service = Service(judge, "judge", Limits(), answers=False)
    app: Any = make_gateway(service, Upstream(engine, 30))
    with TestClient(app, raise_server_exceptions=False) as client:
        for picture, bad in zip(PICTURES, flagged, strict=True):
            seen.clear()
            answer = client.post(CHAT, json=asking(picture)).json()
            assert (seen == []) == bad
            if bad:
                choice = answer["choices"][0]
                assert choice["message"]["content"] == "sorry ."
                assert choice["finish_reason"] == "content_filter"


def test_a_family_that_judges_by_its_language_model_is_loaded_whole(
    run: LoadedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_run_model(tmp_path, run.model, run.processor)
    verdicts = run.screen_images(PICTURES)
    screen = LoadedRun.screen_images

    def asks_for_it(self: LoadedRun, images: list[Image.Image]) -> Any:
        assert self.model.get_input_embeddings().weight is not None
        return screen(self, images)

    monkeypatch.setattr(LoadedRun, "screen_images", asks_for_it)
    judge = open_judge(tmp_path)
    assert judge.screen_images(PICTURES) == verdicts
    assert "the whole model is loaded" in caplog.text
