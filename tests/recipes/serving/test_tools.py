"""Clients, guardrails and red-team tools of others against `vqguard serve` and `vqguard gateway`:
their examples, with the real packages."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from tests.tool_pythons import ROOT, python_with, run_tool
from vqguard.recipes.run import LoadedRun, save_run_model

from .conftest import PICTURES, QUESTION, asking
from .test_contract import WAIT, serving

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.serving]
KEY = "sk-" + "0123456789abcdef" * 4
"""What LiteLLM's proxy wants to be asked with."""
GUARDED = "guarded"
"""The model's name, which the examples' configurations have."""
ENDS = ("content_filter", "(stop|length)")
"""How answers end of which the picture is flagged, and of which it is not."""
SERVING = ROOT / "examples" / "serving"
RED_TEAM = ROOT / "examples" / "red_team"


@pytest.fixture
def pictures(flagged: list[bool], tmp_path: Path) -> tuple[Path, Path]:
    """A flagged one, and one that is not."""
    paths = tmp_path / "bad.png", tmp_path / "good.png"
    for path, bad in zip(paths, (True, False), strict=True):
        PICTURES[flagged.index(bad)].save(path)
    return paths


@pytest.fixture
def server(run: LoadedRun, tmp_path: Path) -> Iterator[str]:
    save_run_model(tmp_path / GUARDED, run.model, run.processor)
    with serving(tmp_path / GUARDED) as (address, _):
        yield address


@pytest.fixture(params=["serve", "gateway"])
def door(request: pytest.FixtureRequest, server: str, tmp_path: Path) -> Iterator[str]:
    """The server, and a gateway in front of it."""
    with ExitStack() as stack:
        if request.param == "serve":
            yield server
            return
        options = ("--upstream", server, "--run", str(tmp_path / GUARDED))
        yield stack.enter_context(gateway(tmp_path, *options))


@contextmanager
def gateway(folder: Path, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "vqguard.cli", "gateway", *options, "--port", "0"]
    with (
        (folder / "gateway.txt").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), (folder / "gateway.txt").read_text()
            yield line.removeprefix("listening on ").strip()
        finally:
            process.kill()


@pytest.fixture
def answers(run: LoadedRun, pictures: tuple[Path, Path]) -> list[str]:
    """What the guarded model says of `pictures`."""
    said = [run.ask(Image.open(path), QUESTION, max_new_tokens=32).text for path in pictures]
    assert said[0].startswith("sorry")
    return said


@pytest.mark.parametrize(
    ("package", "example"),
    [("openai", "openai_client.py"), ("langchain_openai", "langchain_client.py")],
)
def test_clients(
    door: str, pictures: tuple[Path, Path], answers: list[str], package: str, example: str
) -> None:
    for path, word, answer in zip(
        pictures, ("content_filter", "(stop|length)"), answers, strict=True
    ):
        said = run_tool(package, SERVING / example, door, path, QUESTION)
        assert re.search(f"^{word}: {re.escape(answer)}$", said, re.MULTILINE), said
        assert f"streamed: {answer}\n" in said
        if package == "openai":
            bad = word == ENDS[0]
            assert f"flagged: {bad}{' gun' if bad else ''}\n" in said


def test_nemo_guardrails(
    door: str, server: str, pictures: tuple[Path, Path], answers: list[str]
) -> None:
    keys: Any = {"UPSTREAM": f"{server}/v1"}
    program, refusal = SERVING / "nemo_rails.py", "I cannot help with this image."
    for path, expected in zip(pictures, (refusal, answers[1]), strict=True):
        said = run_tool("nemoguardrails", program, path, QUESTION, VQGUARD=door, **keys)
        assert f"answer: {expected}\n" in said
    keys["VQGUARD"] = "http://127.0.0.1:9"  # who cannot be asked has not said yes
    said = run_tool("nemoguardrails", program, pictures[1], QUESTION, **keys)
    assert f"answer: {refusal}\n" in said


@contextmanager
def litellm_proxy(upstream: str, guard: str, folder: Path) -> Iterator[str]:
    """LiteLLM's proxy with the example's configuration."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = "from litellm import run_server; run_server()"
    options = [
        "--config",
        str(SERVING / "litellm.yaml"),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    environment = {
        **os.environ,
        "UPSTREAM": f"{upstream}/v1",
        "VQGUARD": guard,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MASTER_KEY": KEY,
    }
    command = [python_with("litellm"), "-c", program, *options, "--port", str(port)]
    with (
        (folder / "proxy.txt").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/health/liveliness", process, folder / "proxy.txt")
            yield address
        finally:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + WAIT
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            if httpx2.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-4000:])


def test_litellms_proxy_with_the_class(
    door: str, server: str, answers: list[str], flagged: list[bool], tmp_path: Path
) -> None:
    bad, good = (PICTURES[flagged.index(kind)] for kind in (True, False))
    with litellm_proxy(server, door, tmp_path) as proxy:
        url = f"{proxy}/v1/chat/completions"
        body = {**asking(good), "model": "guarded", "max_tokens": 32}
        keys = {"Authorization": f"Bearer {KEY}"}
        answer = httpx2.post(url, json=body, headers=keys, timeout=WAIT)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == answers[1]
        body = {**asking(bad), "model": "guarded"}
        refused = httpx2.post(url, json=body, headers=keys, timeout=WAIT)
        assert refused.status_code == 400, refused.text
        assert "flagged by the guard (image 0: gun)" in refused.text


def test_litellms_class_lets_nothing_through_that_was_not_judged(
    server: str, flagged: list[bool], tmp_path: Path
) -> None:
    with litellm_proxy(server, "http://127.0.0.1:9", tmp_path) as proxy:
        body = {**asking(PICTURES[flagged.index(False)]), "model": "guarded"}
        keys = {"Authorization": f"Bearer {KEY}"}
        url = f"{proxy}/v1/chat/completions"
        refused = httpx2.post(url, json=body, headers=keys, timeout=WAIT)
        assert refused.status_code == 400, refused.text
        assert "not judged" in refused.text


@pytest.mark.parametrize(
    ("package", "example"), [("garak", "garak_generator.py"), ("pyrit", "pyrit_target.py")]
)
def test_red_team_tools(
    door: str, pictures: tuple[Path, Path], answers: list[str], package: str, example: str
) -> None:
    for path, word, answer in zip(
        pictures, ("content_filter", "(stop|length)"), answers, strict=True
    ):
        said = run_tool(package, RED_TEAM / example, door, path, QUESTION)
        assert re.search(f"^{word}: {re.escape(answer)}$", said, re.MULTILINE), said


def test_every_example_is_run_here() -> None:
    text = Path(__file__).read_text()
    # LiteLLM imports its class by the name in its configuration, which is run here
    configured = (SERVING / "litellm.yaml").read_text()
    examples = [*SERVING.glob("*.py"), *RED_TEAM.glob("*.py")]
    run = [p for p in examples if f'"{p.name}"' in text or f": {p.stem}." in configured]
    assert sorted(run) == sorted(examples)
