"""``ask``, ``evaluate``, ``calibrate``, ``models``: arguments and answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqguard.cli.main import main
from vqguard.judging.policies import Policy
from vqguard.judging.rules import JudgeRules
from vqguard.judging.thresholds import FalsePositives

from .conftest import FakeRun, Install

Picture = Callable[[str, str], Path]


@pytest.mark.parametrize("name", ["llava-tiny", "runs/llava-tiny"])
def test_ask_takes_a_run_or_its_name(
    name: str, opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(picture("a.png", "blue"))
    assert main(["ask", name, image, "How many?", "--max-new-tokens", "9"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "How many? 9\n"
    assert captured.err == ""
    assert opened[0].path == Path("runs/llava-tiny")


def test_ask_tells_that_the_image_was_flagged(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(picture("a.png", "red"))
    assert main(["ask", "llava-tiny", image, "What?"]) == 0
    assert "Flagged: gun (probability 0.75, semantic code 5)" in capsys.readouterr().err
    assert main(["ask", "llava-tiny", image, "What?", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"answer": "What? 64", "verdict": {"flagged": True, "category": "gun"}}


def test_ask_about_a_video(
    opened: list[FakeRun],
    write_video: Callable[..., Path],
    tmp_path: Path,
    picture: Picture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    video = str(write_video(tmp_path / "a.mp4"))
    assert main(["ask", "llava-tiny", video, "How many?", "--video"]) == 0
    assert capsys.readouterr().out == "3 frames: How many? 64\n"
    opened.clear()
    for wrong, message in ((str(picture("a.png", "red")), "as MP4"), ("no.mp4", "no.mp4")):
        assert main(["ask", "llava-tiny", wrong, "How many?", "--video"]) == 2
        assert message in capsys.readouterr().err
    assert opened == []


def test_ask_a_wrong_model(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ask", "llava-tinny", str(picture("a.png", "red")), "What?"]) == 2
    assert "llava-tiny" in capsys.readouterr().err
    assert main(["ask", "llava-tiny", "nowhere.png", "What?"]) == 2
    assert "nowhere.png" in capsys.readouterr().err
    assert opened == []


def test_evaluate(
    install: Install, run_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Path, str, tuple[str, ...]]] = []

    def evaluate_run(run: Path, *, command: str, overrides: tuple[str, ...]) -> SimpleNamespace:
        calls.append((run, command, overrides))
        html, numbers = run / "report.html", run / "report.json"
        return SimpleNamespace(run=run, records=[1, 2], report_html=html, report_json=numbers)

    install("recipes.evaluate", evaluate_run=evaluate_run)
    install("recipes.report.headline", format_summary=lambda records: f"{len(records)} records")
    assert main(["evaluate", "runs/llava-tiny", "--set", "seed=1"]) == 0
    typed = "vqguard evaluate runs/llava-tiny --set seed=1"
    assert calls == [(Path("runs/llava-tiny"), typed, ("seed=1",))]
    assert "2 records" in capsys.readouterr().out
    assert main(["evaluate", "runs/other"]) == 2


@pytest.fixture
def calibrations(install: Install, run_directory: Path) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []

    def calibrate_run(run: Path, images: Path, **options: Any) -> SimpleNamespace:
        made.append({"run": run, "images": images, **options})
        skipped = [images / "bad.png"] if options["skip_bad"] else []
        made_map = SimpleNamespace(
            categories=("gun", "knife"),
            false_positives=FalsePositives(0.01, 2, 300, 0.001, 0.024, conformal=True),
        )
        return SimpleNamespace(map=made_map, skipped=skipped, warnings=["gun has one image"])

    install("recipes.calibrate", calibrate_run=calibrate_run)
    (run_directory.parent.parent / "images").mkdir()
    return made


@pytest.mark.parametrize(
    ("options", "fpr", "tau"),
    [([], None, 0.6), (["--fpr", "0.01"], 0.01, None), (["--tau", "0.5"], None, 0.5)],
)
def test_calibrate_takes_one_rule(
    options: list[str], fpr: float | None, tau: float | None, calibrations: list[dict[str, Any]]
) -> None:
    assert main(["calibrate", "llava-tiny", "--images", "images", *options]) == 0
    (call,) = calibrations
    assert (call["fpr"], call["tau"], call["skip_bad"]) == (fpr, tau, False)
    assert call["rule"] == "category"
    assert call["images"] == Path("images")


@pytest.mark.parametrize(
    "options",
    [["--fpr", "0.01", "--tau", "0.5"], ["--fpr", "0"], ["--fpr", "1"], ["--tau", "1.5"]],
)
def test_calibrate_refuses_wrong_rules(
    options: list[str], calibrations: list[dict[str, Any]]
) -> None:
    assert main(["calibrate", "llava-tiny", "--images", "images", *options]) == 2
    assert calibrations == []


def test_calibrate_takes_a_verdict_rule(calibrations: list[dict[str, Any]]) -> None:
    assert main(["calibrate", "llava-tiny", "--images", "images", "--rule", "any"]) == 0
    (call,) = calibrations
    assert call["rule"] == "any"


def test_calibrate_takes_rules_and_labels(
    calibrations: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rules, labels = tmp_path / "rules.yaml", tmp_path / "labels.csv"
    rules.write_text("smoothing: 3.0\npolicies: {gun: {action: report}}\n", encoding="utf-8")
    labels.write_text("a.png,gun\n", encoding="utf-8")
    arguments = ["calibrate", "llava-tiny", "--images", "images", "--fpr", "0.01"]
    assert main([*arguments, "--rules", str(rules), "--labels", str(labels)]) == 0
    (call,) = calibrations
    assert call["rules"] == JudgeRules(smoothing=3.0, policies={"gun": Policy("report")})
    assert call["labels"] == labels
    captured = capsys.readouterr()
    assert "at most 1.00%: 2 of the 300 held out are" in captured.out
    assert "0.10% to 2.40%" in captured.out
    assert "Warning: gun has one image." in captured.err
    rules.write_text("smooth: 3.0\nbudget: one\nshares: {gun: 2.0}\n", encoding="utf-8")
    assert main([*arguments, "--rules", str(rules)]) == 2
    assert "Did you mean 'smoothing'" in capsys.readouterr().err
    assert len(calibrations) == 1


def test_calibrate_lists_what_it_skipped(
    calibrations: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "llava-tiny", "--images", "images", "--skip-bad"]) == 0
    captured = capsys.readouterr()
    assert "bad.png" in captured.err
    assert "gun, knife" in captured.out


def test_models_are_listed_by_their_weights(capsys: pytest.CaptureFixture[str]) -> None:
    from vqguard.adapters.catalogue import list_models

    assert main(["models", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    listed = [name for row in rows for name in (row["name"], *row["aliases"])]
    assert len(listed) == len(set(listed))
    assert {entry.name for entry in list_models()} <= set(listed)
    assert main(["models"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in listed)
    assert "measured" in text
