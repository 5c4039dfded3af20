"""Paths as people write them, and what a command says where nobody watches."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import click
import pytest
from tqdm import tqdm

from vqguard.adapters.catalogue import resolve_model
from vqguard.cli.main import COMMANDS, USAGE, main
from vqguard.cli.main import program as vqguard
from vqguard.cli.options import UserPath
from vqguard.errors import ConfigError
from vqguard.recipes.console.libraries import quiet_libraries
from vqguard.recipes.console.progress import Progress
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.search.faiss_index import FaissSearch


@pytest.mark.parametrize("name", COMMANDS)
def test_every_path_of_every_command_is_filled_in(name: str) -> None:
    command = vqguard.get_command(click.Context(vqguard), name)
    assert command is not None
    paths = [option for option in command.params if isinstance(option.type, click.Path)]
    assert all(isinstance(option.type, UserPath) for option in paths)


def test_home_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SETS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    kind = UserPath()
    for written in ("~/data", "$SETS/data", "${SETS}/data"):
        assert kind.convert(written, None, None) == tmp_path / "data"
        assert resolve_model(written).location == str(tmp_path / "data")
    assert kind.convert("~nobody-of-this-name/x", None, None) == Path("~nobody-of-this-name/x")
    Path("$SETS").write_text("a file of this name")
    assert kind.convert("$SETS", None, None) == Path("$SETS")


def test_an_error_has_its_own_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        bar = tqdm(total=9, desc="stage2", file=sys.stderr, mininterval=0)
        bar.update(3)
        raise ConfigError("no")

    monkeypatch.setattr(vqguard, "main", fail)
    assert main([]) == USAGE
    assert "Error: no" in capsys.readouterr().err.split("\n")


def test_without_a_terminal_there_is_a_line_a_minute(
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), Progress(100, "stage1") as progress:
        for _ in range(100):
            now[0] += 1.5
            progress.update(figures={"loss": "0.5"})
    assert [record.getMessage() for record in caplog.records] == [
        "stage1: 40 of 100 (40%), 01:30 left, loss 0.5",
        "stage1: 80 of 100 (80%), 00:30 left, loss 0.5",
        "stage1: 100 of 100 (100%), loss 0.5",
    ]
    assert capsys.readouterr().err == ""


def test_libraries_are_quiet(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "0")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quiet_libraries()
        warnings.warn("`past_key_values` is deprecated and will be removed", stacklevel=1)
        warnings.warn("something else is deprecated", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["something else is deprecated"]
    functions = logging.getLogger("transformers.utils.generic")
    functions.warning("`past_key_values`/`cache_params` are deprecated. Use `cache` instead.")
    functions.warning("something else")
    assert caplog.messages == ["something else"]
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


def test_a_search_that_does_not_run_here_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FaissSearch, "problem", classmethod(lambda cls: "faiss is not installed"))
    recipe = load_recipe("llava-tiny").override(["guard.search=faiss"])
    with pytest.raises(ConfigError, match=r"guard\.search=faiss does not run here: faiss is not"):
        retrofit(recipe, tmp_path / "run", command="")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
