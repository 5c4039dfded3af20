"""`vqguard serve RUN` as a process: what it prints, how it ends; and clients that others wrote."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from vqguard.cli.main import main
from vqguard.recipes.run import LoadedRun, save_run_model

from .conftest import CHAT, NAME, PICTURES, QUESTION, asking, data_uri

WAIT = 300.0
pytestmark = pytest.mark.alone


@pytest.fixture
def folder(run: LoadedRun, tmp_path: Path) -> Path:
    save_run_model(tmp_path / NAME, run.model, run.processor)
    return tmp_path / NAME


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address that a server printed, and its process."""
    command = [sys.executable, "-m", "vqguard.cli", "serve", str(folder), "--port", "0", *options]
    with (
        (folder.parent / "log.txt").open("w") as log,  # a pipe that nobody reads would stop it
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on http://127.0.0.1:"), line
            yield line.removeprefix("listening on ").strip(), process
        finally:
            if process.poll() is None:
                process.kill()


def ended(process: subprocess.Popen[str]) -> int:
    """Its exit code after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    return process.wait(WAIT)


def test_it_says_where_it_listens_and_drains(folder: Path, flagged: list[bool]) -> None:
    with serving(folder) as (address, process):
        assert httpx2.get(f"{address}/health").status_code == 200
        body = asking(PICTURES[flagged.index(False)], max_tokens=300, stream=True)
        with httpx2.stream("POST", address + CHAT, json=body, timeout=WAIT) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises(httpx2.ConnectError):
                httpx2.get(f"{address}/health")
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert ended(process) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("flagged")
def test_openais_client(folder: Path, run: LoadedRun) -> None:
    with serving(folder) as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [NAME]
        for picture in PICTURES[:4]:
            asked: Any = asking(picture)
            alone = run.ask(picture, QUESTION, max_new_tokens=6)
            answer = client.chat.completions.create(**asked)
            assert answer.choices[0].message.content == alone.text
            assert (answer.choices[0].finish_reason == "content_filter") == alone.verdict.flagged
            chunks = list(client.chat.completions.create(**asked, stream=True))
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == alone.text
            assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason
            shown: Any = [{"type": "image_url", "image_url": {"url": data_uri(picture)}}]
            judged = client.moderations.create(model="omni-moderation-latest", input=shown)
            assert judged.results[0].flagged == alone.verdict.flagged
        with pytest.raises(openai.BadRequestError, match="n: "):
            client.chat.completions.create(**asking(PICTURES[0], n=2))
        with pytest.raises(openai.NotFoundError, match="/v1/models"):
            client.chat.completions.create(**{**asking(PICTURES[0]), "model": "gpt"})
        assert ended(process) == 0


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_fuzzer_finds_no_500(folder: Path) -> None:
    with serving(folder) as (address, process):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "schemathesis.cli",
                "run",
                f"{address}/openapi.json",
                "--checks=not_a_server_error",
                "--max-examples=40",
                "--request-timeout=120",
                "--seed=1",
                "--suppress-health-check=all",
                "--no-color",
            ],
            cwd=folder.parent,  # where it leaves a cache
            capture_output=True,
            text=True,
            timeout=2 * WAIT,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        assert ended(process) == 0


MIX = ("clean", "flagged", "broken", "huge", "slow", "aborted")


@pytest.mark.slow
def test_many_clients_of_every_kind(folder: Path, run: LoadedRun, flagged: list[bool]) -> None:
    """Fifty at a time: no wrong verdict, no 500, and it answers as before when they have gone."""
    expected = {
        bad: (picture, run.ask(picture, QUESTION, max_new_tokens=6).text)
        for bad, picture in reversed(list(zip(flagged, PICTURES, strict=True)))
    }
    seen: dict[str, int] = dict.fromkeys(MIX, 0)
    problems: list[str] = []
    until = float("inf")

    def client(number: int, address: str) -> None:
        place = number
        while time.monotonic() < until and not problems:
            kind = MIX[place % len(MIX)]
            place += 1
            try:
                KINDS[kind](address, expected)
                seen[kind] += 1
            except Exception as error:
                problems.append(f"{kind}: {error!r}")

    with serving(folder) as (address, process):
        until = time.monotonic() + 20
        clients = [threading.Thread(target=client, args=(n, address)) for n in range(50)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(WAIT)
        assert problems == []
        assert min(seen.values()) >= 5, seen
        ask_clean(address, expected)
        assert ended(process) == 0


Expected = dict[bool, tuple[Image.Image, str]]


def post(address: str, body: Any) -> httpx2.Response:
    return httpx2.post(address + CHAT, json=body, timeout=WAIT)


def _ask(address: str, expected: Expected, bad: bool) -> None:
    picture, text = expected[bad]
    answer = post(address, asking(picture))
    if answer.status_code == 429:
        assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.2)
        return
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert choice["message"]["content"] == text
    assert (choice["finish_reason"] == "content_filter") == bad


def ask_clean(address: str, expected: Expected) -> None:
    _ask(address, expected, False)


def ask_flagged(address: str, expected: Expected) -> None:
    _ask(address, expected, True)


def send_broken(address: str, _: Expected) -> None:
    body = asking(PICTURES[0])
    url = body["messages"][0]["content"][0]["image_url"]
    url["url"] = url["url"][: len(url["url"]) // 2 // 4 * 4]
    assert post(address, body).status_code in (400, 429)


def send_huge(address: str, _: Expected) -> None:
    assert post(address, asking(Image.new("RGB", (6000, 6000)))).status_code in (400, 429)


def send_slowly(address: str, _: Expected) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(3):
            time.sleep(0.1)
            yield b" "
        yield b"{}"

    headers = {"content-type": "application/json"}
    answer = httpx2.post(address + CHAT, content=pieces(), headers=headers, timeout=WAIT)
    assert answer.status_code in (400, 429)


def send_and_leave(address: str, expected: Expected) -> None:
    body = asking(expected[False][0], max_tokens=300, stream=True)
    with httpx2.stream("POST", address + CHAT, json=body, timeout=WAIT) as answer:
        assert answer.status_code in (200, 429)
        next(answer.iter_lines())


KINDS: dict[str, Callable[[str, Expected], None]] = {
    "clean": ask_clean,
    "flagged": ask_flagged,
    "broken": send_broken,
    "huge": send_huge,
    "slow": send_slowly,
    "aborted": send_and_leave,
}
