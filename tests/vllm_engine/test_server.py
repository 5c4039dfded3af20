"""vLLM's own server on a guarded folder, with an engine in a process of its own."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .conftest import WHY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.alone,
    pytest.mark.skipif(find_spec("vllm") is None, reason=WHY),
]
REFUSAL = "sorry , i cannot help with that ."
Post = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def post(llava_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    """(path, body) -> (status, JSON or text), from a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    options = {
        "--model": llava_folder,
        "--served-model-name": "tiny",
        "--port": port,
        "--host": "127.0.0.1",
        "--dtype": "float32",
        "--max-model-len": 512,
        "--max-num-seqs": 8,
    }
    flags = [str(part) for option in options.items() for part in option]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(
            [*command, *flags, "--enforce-eager"], env=environment, stdout=out, stderr=out
        )
    address = f"http://127.0.0.1:{port}"

    def send(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        data = json.dumps({"model": "tiny", **body}).encode()
        request = urllib.request.Request(
            address + path, data, {"Content-Type": "application/json", "x-api-key": "none"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith("{") else text

    try:
        for _ in range(300):
            assert server.poll() is None, log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(address + "/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-4000:])
        yield send
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def both(post: Post, pictures: list[Image.Image]) -> tuple[str, str]:
    """Data URIs of a picture that is refused, and of one that is not."""
    found: dict[bool, str] = {}
    for picture in pictures:
        uri = _uri(picture)
        status, answer = post("/v1/chat/completions", _chat(uri))
        assert status == 200, answer
        found.setdefault(answer["choices"][0]["message"]["content"].strip() == REFUSAL, uri)
        if len(found) == 2:
            break
    return found[True], found[False]


@pytest.fixture
def flagged(both: tuple[str, str]) -> str:
    return both[0]


def _uri(picture: Image.Image) -> str:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _chat(uri: str, **extra: Any) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": uri}}
    content = [picture, {"type": "text", "text": "what is in the image ?"}]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 24, "temperature": 0, **extra}


def test_a_chat_is_refused_with_status_200(post: Post, both: tuple[str, str]) -> None:
    refused, answered = (post("/v1/chat/completions", _chat(uri)) for uri in both)
    assert refused[0] == answered[0] == 200
    assert refused[1]["choices"][0]["message"]["content"].strip() == REFUSAL
    assert refused[1]["choices"][0]["finish_reason"] == "stop"
    assert answered[1]["choices"][0]["message"]["content"].strip() != REFUSAL


def test_a_stream_is_refused(post: Post, flagged: str) -> None:
    status, text = post("/v1/chat/completions", _chat(flagged, stream=True))
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    said = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
    assert (status, said.strip()) == (200, REFUSAL)


def test_several_answers_are_refused(post: Post, flagged: str) -> None:
    status, answer = post("/v1/chat/completions", _chat(flagged, n=3, temperature=1))
    assert status == 200
    assert [choice["message"]["content"].strip() for choice in answer["choices"]] == [REFUSAL] * 3


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "say", "parameters": SCHEMA}}


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            }
        },
        {"structured_outputs": {"choice": ["red", "blue"]}},
    ],
    ids=["object", "schema", "choice"],
)
def test_structured_output_is_refused_and_no_error(
    post: Post, flagged: str, asked: dict[str, Any]
) -> None:
    status, answer = post("/v1/chat/completions", _chat(flagged, **asked))
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"].strip() == REFUSAL


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "say"}}])
def test_a_forced_tool_is_not_called(post: Post, flagged: str, choice: Any) -> None:
    status, answer = post("/v1/chat/completions", _chat(flagged, tools=[TOOL], tool_choice=choice))
    assert status in (200, 400), answer
    if status == 200:
        message = answer["choices"][0]["message"]
        calls = message.get("tool_calls") or []
        said = [call["function"]["arguments"] for call in calls] or [message["content"]]
        assert [text.strip() for text in said] == [REFUSAL]


def test_other_protocols_are_refused(post: Post, flagged: str) -> None:
    picture = {"type": "input_image", "image_url": flagged, "detail": "auto"}
    content = [picture, {"type": "input_text", "text": "what is in the image ?"}]
    status, answer = post(
        "/v1/responses",
        {"input": [{"role": "user", "content": content}], "max_output_tokens": 24},
    )
    assert status == 200, answer
    assert answer["output"][-1]["content"][0]["text"].strip() == REFUSAL
    data = flagged.partition(",")[2]
    source: Any = {"type": "base64", "media_type": "image/png", "data": data}
    shown: list[Any] = [
        {"type": "image", "source": source},
        {"type": "text", "text": "what is this ?"},
    ]
    status, answer = post(
        "/v1/messages", {"messages": [{"role": "user", "content": shown}], "max_tokens": 24}
    )
    assert status == 200, answer
    assert answer["content"][0]["text"].strip() == REFUSAL


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"mm_processor_kwargs": {"do_normalize": False}}, "mm_processor_kwargs"),
        ({"media_io_kwargs": {"image": {"image_mode": "L"}}}, "media_io_kwargs"),
        ({"use_beam_search": True, "n": 2}, "eam search"),
    ],
)
def test_what_goes_round_the_guard_is_a_400(
    post: Post, flagged: str, extra: dict[str, Any], named: str
) -> None:
    status, answer = post("/v1/chat/completions", _chat(flagged, **extra))
    assert status == 400, answer
    assert named in json.dumps(answer)


def test_a_name_for_a_picture_is_no_key(post: Post, both: tuple[str, str]) -> None:
    for uri, refused in zip(both, (True, False), strict=True):
        body = _chat(uri)
        body["messages"][0]["content"][0]["uuid"] = "known"
        status, answer = post("/v1/chat/completions", body)
        assert status == 200, answer
        said = answer["choices"][0]["message"]["content"].strip()
        assert (said == REFUSAL) == refused
    body["messages"][0]["content"][0]["image_url"] = None
    assert post("/v1/chat/completions", body)[0] == 400


def test_addresses_are_not_fetched(post: Post) -> None:
    for address in ("http://127.0.0.1:9/a.png", "http://example.org/a.png"):
        status, answer = post("/v1/chat/completions", _chat(address))
        assert status == 400, answer
        assert "domains" in json.dumps(answer)


def test_a_broken_picture_is_a_400(post: Post) -> None:
    status, _ = post("/v1/chat/completions", _chat("data:image/png;base64,AAAA"))
    assert status == 400


def test_endpoints_that_take_features_are_closed(post: Post) -> None:
    status, _ = post("/inference/v1/generate", {"token_ids": [5, 6], "sampling_params": {}})
    assert status == 403
