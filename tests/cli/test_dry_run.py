"""``vqguard retrofit --dry-run``."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from vqguard.cli.main import main


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a plan reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)


def test_a_plan_is_printed_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["retrofit", "--model", "llava-1.5", "--dry-run", "--gpu-memory", "24GB"]
    assert main([*command, "--set", "stage2.max_length=1024"]) == 0
    out = capsys.readouterr().out
    assert "max_length: 1024" in out
    assert "2180 steps" in out
    assert "low-rank adapters 319.82 M" in out
    assert "fits in 24 GB" in out
    assert list(tmp_path.iterdir()) == []


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrofit", "--model", "llava-tiny", "--dry-run", "--gpus", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu"
    assert found["recipe"]["model"] == "llava-tiny"
    for stage in found["stages"]:
        parts = {k: v for k, v in stage["memory"].items() if k != "total"}
        assert stage["memory"]["total"] == sum(parts.values())


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (["--gpu-memory", "24GB"], "--dry-run"),
        (["--dry-run", "--gpu-memory", "large"], "24GB"),
        (["--dry-run", "--gpus", "7"], "micro_batch"),
    ],
)
def test_wrong_options(options: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrofit", "--model", "llava-tiny", *options]) == 2
    assert answer in capsys.readouterr().err


def test_a_recipe_names_its_own_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrofit", "--model", "llava-next", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["model"] == "llava-next-8b"
