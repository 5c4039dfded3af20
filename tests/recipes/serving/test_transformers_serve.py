"""`transformers serve` and a guarded model's folder: no start, and no answer."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from vqguard.recipes.run import LoadedRun, save_run_model

from .conftest import CHAT, NAME, PICTURES, asking

WAIT = 300.0
# As on a machine of somebody who does not have the package.
PROGRAM = (
    "import sys; sys.modules['vqguard'] = None\n"
    "from transformers.cli.transformers import main\n"
    "main()\n"
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.alone,
    pytest.mark.transformers_from("5.24", why="its server is called in this way"),
]


@pytest.fixture
def folder(run: LoadedRun, tmp_path: Path) -> Path:
    save_run_model(tmp_path / NAME, run.model, run.processor)
    return tmp_path / NAME / "model"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, "serve", "--device", "cpu", *arguments]


def test_it_does_not_start(folder: Path) -> None:
    done = subprocess.run(
        command("--port", "0", str(folder)), capture_output=True, text=True, timeout=WAIT
    )
    assert done.returncode != 0
    assert "vqguard" in done.stderr


def test_it_answers_no_request_for_one(folder: Path) -> None:
    """Its clients may name any folder: a server that already runs opens none of ours."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    arguments = command("--host", "127.0.0.1", "--port", str(port))
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            until = time.monotonic() + WAIT
            while not _answers(address):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.5)
            body: dict[str, Any] = {**asking(PICTURES[0]), "model": str(folder)}
            answer = httpx2.post(address + CHAT, json=body, timeout=WAIT)
            assert answer.status_code >= 400
            assert "choices" not in answer.text
        finally:
            process.kill()


def _answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/health", timeout=WAIT).status_code == 200
    except httpx2.TransportError:
        return False
