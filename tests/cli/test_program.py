"""The group itself: names, exit codes, and what ``--help`` may import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
from safetensors import SafetensorError

from vqguard.cli.main import COMMANDS, main, program
from vqguard.errors import InputError

HEAVY = (
    "torch",
    "transformers",
    "faiss",
    "numpy",
    "PIL",
    "matplotlib",
    "rich",
    "fastapi",
    "uvicorn",
)


@pytest.mark.alone
@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from vqguard.cli.main import main\n"
        f"code = main({arguments!r})\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"


@pytest.mark.alone
def test_help_of_the_program_imports_no_command() -> None:
    script = (
        "import sys\n"
        "from vqguard.cli.main import COMMANDS, main\n"
        "main(['--help'])\n"
        "print([e.module for e in COMMANDS.values() if e.module in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Usage: vqguard {name}" in text
    assert f"  vqguard {name}" in text.split("Example")[1]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    command = program.get_command(click.Context(program), name)
    assert command is not None
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    for each in commands:
        options = [p for p in each.params if isinstance(p, click.Option)]
        assert options
        assert [option.name for option in options if not option.help] == []


@pytest.mark.parametrize(
    ("arguments", "guess"),
    [
        (["retrofitt"], "'retrofit'"),
        (["calibrat", "x"], "'calibrate'"),
        (["Scan"], "'scan'"),
        (["scan", "--jsn", "x.png"], "--json"),
        (["retrofit", "--modle", "llava-tiny"], "--model"),
        (["xyzzy"], "retrofit, pretrain-tiny, scan"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(
    arguments: list[str], guess: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert guess in captured.err
    assert captured.out == ""


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert version("vqguard") in capsys.readouterr().out


def raising(error: BaseException) -> click.Command:
    def callback() -> None:
        raise error

    return click.Command("models", callback=callback)


@pytest.mark.parametrize(
    ("error", "code", "traceback"),
    [
        (InputError("expected this, got that"), 2, False),
        (OSError(28, "No space left on device", "runs/x/checkpoint"), 2, False),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device"),
            2,
            False,
        ),
        (SafetensorError("Error while deserializing header"), 3, True),
        (click.FileError("file", "hint"), 2, False),
        (KeyboardInterrupt(), 130, False),
        (ZeroDivisionError("oh"), 3, True),
    ],
)
def test_errors_have_their_exit_codes(
    error: BaseException,
    code: int,
    traceback: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(program, "get_command", lambda _ctx, _name: raising(error))
    assert main(["models"]) == code
    captured = capsys.readouterr()
    assert ("Traceback" in captured.err) is traceback
    assert captured.out == ""
    if isinstance(error, OSError):
        assert "runs/x/checkpoint" in captured.err
    assert ("--resume" in captured.err) is ("No space left" in str(error))


@pytest.mark.parametrize("arguments", [["--debug", "scan", "x.png"], ["scan", "x.png", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert "Traceback" in capsys.readouterr().err
    assert main(["scan", "x.png"]) == 2
    assert "Traceback" not in capsys.readouterr().err
