"""``vqguard retrofit`` and ``pretrain-tiny``: arguments, directories, what is passed below."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqguard.cli.main import main
from vqguard.errors import InputError

from .conftest import FakeRecipe, Install

NAMES = ["llava-tiny", "llava"]


@pytest.fixture
def calls(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[dict[str, Any]]:
    """Replaces the retrofit and the recipes; the list collects what was asked for."""
    monkeypatch.chdir(tmp_path)
    made: list[dict[str, Any]] = []

    def retrofit(recipe: FakeRecipe, output: Path, **options: Any) -> SimpleNamespace:
        made.append({"recipe": recipe, "output": output, **options})
        html, numbers = output / "report.html", output / "report.json"
        return SimpleNamespace(run=output, records=[], report_html=html, report_json=numbers)

    def pretrain(recipe: FakeRecipe, output: Path, **options: Any) -> SimpleNamespace:
        made.append({"recipe": recipe, "output": output, **options})
        weights = output / "weights.safetensors"
        return SimpleNamespace(weights=weights, records=[], report_json=output / "report.json")

    def load_recipe(name: str | Path) -> FakeRecipe:
        return FakeRecipe(name if isinstance(name, str) else "from-file")

    def resolve_model(name: str) -> SimpleNamespace:
        if name != "big-model":
            raise InputError(f"No model is named {name!r}.")
        return SimpleNamespace(name=name, source="path", model_type="", location=name)

    install("recipes.recipe", load_recipe=load_recipe, recipe_names=lambda: list(NAMES))
    install("recipes.retrofit", retrofit=retrofit)
    install("recipes.report.headline", format_summary=lambda records: f"{len(records)} records")
    install("recipes.pretrain_tiny", pretrain=pretrain, load_pretrain_recipe=lambda _: FakeRecipe())
    install("adapters.catalogue", resolve_model=resolve_model)
    return made


def test_defaults(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["retrofit", "--model", "llava-tiny"]) == 0
    (call,) = calls
    assert call["output"] == Path("runs/llava-tiny")
    assert call["recipe"].model == "llava-tiny"
    assert call["recipe"].changes == ()
    assert call["resume"] is False
    assert call["skip_bad"] is False
    assert call["command"] == "vqguard retrofit --model llava-tiny"
    out = capsys.readouterr().out
    assert "0 records" in out
    assert str(Path("runs/llava-tiny/report.html")) in out


def test_every_option_reaches_the_recipe_and_set_comes_last(
    calls: list[dict[str, Any]], tmp_path: Path
) -> None:
    data, images = tmp_path / "my data.json", tmp_path / "images"
    data.write_text("[]")
    images.mkdir()
    arguments = ["retrofit", "--model", "llava-tiny", "--data", str(data), "--images", str(images)]
    arguments += ["--set", "seed=3", "--set", "model=other", "--output", "out", "--skip-bad"]
    assert main(arguments) == 0
    (call,) = calls
    assert call["recipe"].changes == (
        f'data="{data}"',
        f'images="{images}"',
        "seed=3",
        "model=other",
    )
    assert call["output"] == Path("out")
    assert call["skip_bad"] is True
    assert f"'{data}'" in call["command"]


def test_a_config_file_needs_no_model(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model: x\n")
    assert main(["retrofit", "--config", str(config)]) == 0
    assert calls[0]["recipe"].model == "from-file"
    assert calls[0]["recipe"].changes == ()
    assert calls[0]["output"] == Path("runs/from-file")


def test_neither_model_nor_config(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retrofit"]) == 2
    assert "llava-tiny" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        ("llava-tniy", "Did you mean 'llava-tiny'?"),
        ("zzz", "No model is named 'zzz'"),
        ("big-model", "cannot read big-model/config.json"),
    ],
)
def test_a_wrong_model_is_answered(
    model: str, answer: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retrofit", "--model", model]) == 2
    assert answer in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize("command", [["retrofit", "--model", "llava-tiny"], ["pretrain-tiny"]])
def test_an_output_directory_that_holds_something_is_kept(
    command: list[str],
    calls: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    arguments = [*command, "--output", str(output)]
    assert main(arguments) == 0  # an empty one is fine
    (output / "kept.txt").write_text("result")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert str(output) in error
    assert "--resume" in error
    assert "--output" in error
    assert main([*arguments, "--resume"]) == 0
    assert [call["resume"] for call in calls] == [False, True]
    assert (output / "kept.txt").read_text() == "result"


def test_the_default_output_is_checked_too(calls: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "runs" / "llava-tiny").mkdir(parents=True)
    (tmp_path / "runs" / "llava-tiny" / "kept.txt").write_text("result")
    assert main(["retrofit", "--model", "llava-tiny"]) == 2
    assert calls == []


def test_an_output_that_is_a_file(
    calls: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "file"
    output.write_text("")
    assert main(["retrofit", "--model", "llava-tiny", "--output", str(output), "--resume"]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "answer"), [("seed", "KEY=VALUE"), ("=3", "KEY=VALUE"), ("unknown=1", "'known'")]
)
def test_a_wrong_setting(
    setting: str, answer: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["retrofit", "--model", "llava-tiny", "--set", setting]) == 2
    assert answer in capsys.readouterr().err
    assert calls == []


def test_pretrain_says_where_the_weights_are(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain-tiny", "--set", "seed=1"]) == 0
    assert calls[0]["recipe"].changes == ("seed=1",)
    assert calls[0]["command"] == "vqguard pretrain-tiny --set seed=1"
    assert "weights.safetensors" in capsys.readouterr().out
