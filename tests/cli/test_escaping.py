"""Names, categories, answers and errors from outside are escaped, in all commands."""

from __future__ import annotations

import json
import logging
import re
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.layout import ROOT
from vqguard.adapters.proof import conformance
from vqguard.adapters.proof.results import FailedCheckError
from vqguard.cli.main import COMMANDS, main, program
from vqguard.errors import ArtefactError, ConfigError, ImageError
from vqguard.judging.settings import CellRule, JudgeSettings
from vqguard.recipes.judging import map_changes
from vqguard.recipes.report.map_page import write_map_page
from vqguard.safety_map import SafetyMap, Verdict

from .conftest import FakeRun, FakeVerdict, Install

Picture = Callable[[str, str], Path]

FORGED = "photo.png: ok (neutral, probability 0.00, semantic code 5)"
HOSTILE = f"a\x1b[31m\x9b\x7f\u202e\u200b\u2028\r\udcff\n{FORGED}\n"


def assert_harmless(text: str) -> None:
    """Nothing in a command's output acts, and no line of it is forged."""
    unsafe = {c for c in text if c not in "\n\t" and unicodedata.category(c)[0] == "C"}
    assert unsafe == set()
    assert not {"\u2028", "\u2029"} & set(text)
    assert FORGED not in text.split("\n")


class Outcome:
    """Runs the program and holds what it wrote to the check above."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = self.capsys.readouterr()
        assert_harmless(captured.out)
        assert_harmless(captured.err)
        return code, captured.out, captured.err


@pytest.fixture
def run_program(capsys: pytest.CaptureFixture[str]) -> Outcome:
    return Outcome(capsys)


@pytest.fixture
def hostile_picture(tmp_path: Path) -> Path:
    path = tmp_path / HOSTILE.replace("/", "")
    try:
        Image.new("RGB", (8, 8), "red").save(path, "png")
    except (OSError, UnicodeError):
        pytest.skip("the file system takes no such name")
    return path


def test_scan(opened: list[FakeRun], hostile_picture: Path, run_program: Outcome) -> None:
    code, out, err = run_program("scan", str(hostile_picture))
    assert code == 1
    assert len(out.splitlines()) == 1
    assert re.search(r"\\udcff.*: flagged \(gun", out)
    code, out, err = run_program("scan", "--json", str(hostile_picture))
    assert json.loads(out)["image"] == str(hostile_picture)
    hostile_picture.write_bytes(b"no image")
    for options in ([], ["--skip-bad"], ["--skip-bad", "--json"]):
        code, out, err = run_program("scan", *options, str(hostile_picture))
        assert code == 2
        assert "\\x1b" in err
    folder = hostile_picture.parent / f"folder{HOSTILE}"
    folder.mkdir()
    hostile_picture.rename(folder / HOSTILE)
    assert run_program("scan", str(folder))[0] == 2
    (folder / "loop\x1b").symlink_to(folder)
    assert run_program("scan", str(folder))[0] == 2
    assert run_program("scan", HOSTILE)[0] == 2
    assert run_program("scan", "--files-from", HOSTILE)[0] == 2
    assert run_program("scan", "--run", HOSTILE, "x.png")[0] == 2
    output = str(hostile_picture.parent / f"out{HOSTILE}")
    assert run_program("scan", str(folder), "--output", output, "--image-column", HOSTILE)[0] == 2
    assert run_program("scan", str(folder), "--output", output, "--ray", HOSTILE)[0] == 2
    assert run_program("scan", str(folder), "--output", str(folder / HOSTILE))[0] == 2


def test_no_part_of_a_line_is_forged(
    opened: list[FakeRun], picture: Picture, run_program: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(_self: FakeRun, images: list[Image.Image]) -> list[FakeVerdict]:
        return [FakeVerdict(True, f"gun): ok ({HOSTILE}") for _ in images]

    monkeypatch.setattr(FakeRun, "screen_images", judge)
    path = picture(f"{FORGED}.png", "red")
    code, out, _ = run_program("scan", str(path))
    assert code == 1
    assert ": ok" not in out
    assert out.count(": ") == 1
    assert ": flagged (gun" in out


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=40))
@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_scan_of_any_name(opened: list[FakeRun], run_program: Outcome, name: str) -> None:
    path = Path("drawn", name)
    path.parent.mkdir(exist_ok=True)
    if name in (".", ".."):
        return
    try:
        Image.new("RGB", (8, 8), "blue").save(path, "png")
    except (OSError, UnicodeError):  # the file system takes no such name
        return
    try:
        code, out, _ = run_program("scan", str(path))
        assert code == 0
        assert len(out.splitlines()) == 1
        assert re.fullmatch(r"[^\n]*: ok \(neutral, probability 0\.00, semantic code 5\)\n", out)
        code, out, _ = run_program("scan", "--json", "drawn")
        assert code == 0
        assert json.loads(out)["image"] == str(path)
    finally:
        path.unlink()


def test_ask(
    opened: list[FakeRun],
    hostile_picture: Path,
    run_program: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(_self: FakeRun, *_: Any) -> SimpleNamespace:
        answer = HOSTILE.replace(FORGED, "a second line")
        return SimpleNamespace(text=answer, verdict=FakeVerdict(True, HOSTILE))

    monkeypatch.setattr(FakeRun, "ask", ask)
    code, out, err = run_program("ask", "llava-tiny", str(hostile_picture), "What?")
    assert code == 0
    assert out.splitlines()[1] == "a second line"
    assert len(err.splitlines()) == 1
    code, out, _ = run_program("ask", "--json", "llava-tiny", str(hostile_picture), "What?")
    assert json.loads(out)["verdict"]["category"] == HOSTILE
    assert run_program("ask", "llava-tiny", f"no{HOSTILE}", "What?")[0] == 2
    assert run_program("ask", HOSTILE, "x.png", "What?")[0] == 2


def test_calibrate(
    install: Install, run_directory: Path, run_program: Outcome, tmp_path: Path
) -> None:
    def calibrate_run(*_: Any, **__: Any) -> SimpleNamespace:
        made = SimpleNamespace(categories=("gun", HOSTILE), false_positives=None)
        return SimpleNamespace(
            map=made, skipped=[f"{HOSTILE}: is empty"], warnings=[f"{HOSTILE} has one image"]
        )

    install("recipes.calibrate", calibrate_run=calibrate_run)
    (tmp_path / "images").mkdir()
    code, out, err = run_program("calibrate", "llava-tiny", "--images", "images")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert len(err.splitlines()) == 2
    assert run_program("calibrate", "llava-tiny", "--images", HOSTILE)[0] == 2
    assert run_program("calibrate", HOSTILE, "--images", "images")[0] == 2
    for option in ("--labels", "--rules"):
        arguments = ("calibrate", "llava-tiny", "--images", "images", option, HOSTILE)
        assert run_program(*arguments)[0] == 2


def test_attack(
    install: Install, run_directory: Path, run_program: Outcome, tmp_path: Path
) -> None:
    condition = {"attack": HOSTILE, "gradient": HOSTILE, "eps_255": 1.0, "judge": HOSTILE}
    rates = SimpleNamespace(subject="guarded", metric="asr", value=1.0, n=3, condition=condition)
    alarm = SimpleNamespace(subject=HOSTILE, sentence=HOSTILE, where=HOSTILE, next=HOSTILE)
    given = SimpleNamespace(records=[rates], alarms=[alarm])
    install(
        "recipes.attacking.run_suite",
        run_suite=lambda *_, **__: given,
        RECORDS="records.json",
        REPORT="report.html",
    )
    attack = ("attack", "llava-tiny", "--output", "out")
    assert run_program("attack", "llava-tiny", "--output", "out")[0] == 0
    assert run_program(*attack, "--fail-above", "asr=0.5,eps_255=1")[0] == 1
    assert run_program(*attack, "--suite", HOSTILE)[0] == 2
    assert run_program(*attack, "--benchmark", HOSTILE)[0] == 2
    assert run_program(*attack, "--fail-above", HOSTILE)[0] == 2
    assert run_program("attack", HOSTILE, "--output", "out")[0] == 2


def test_certify(run_directory: Path, run_program: Outcome, hostile_picture: Path) -> None:
    certify = ("certify", "llava-tiny", "--output", "out")
    assert run_program("certify", HOSTILE, "--output", "out")[0] == 2
    assert run_program(*certify, "--images", HOSTILE)[0] == 2
    assert run_program("certify", "llava-tiny", "--output", str(hostile_picture))[0] == 2
    folder = hostile_picture.parent / f"folder{HOSTILE}"
    (folder / HOSTILE).mkdir(parents=True)
    assert run_program(*certify, "--images", str(folder))[0] == 2


def test_serve(install: Install, run_directory: Path, run_program: Outcome) -> None:
    pytest.importorskip("fastapi")
    assert run_program("serve", HOSTILE)[0] == 2
    assert run_program("serve", "llava-tiny", "--host", HOSTILE)[0] == 2
    assert run_program("serve", "llava-tiny", "--port", "0", "--limits", HOSTILE)[0] == 2
    install("recipes.run", open_run=lambda *_, **__: None, model_checksum=lambda _: "")
    assert run_program("serve", "llava-tiny", "--port", "0", "--image-host", HOSTILE)[0] == 2


def test_gateway(install: Install, run_directory: Path, run_program: Outcome) -> None:
    pytest.importorskip("fastapi")
    gateway = ("gateway", "--upstream", "http://127.0.0.1:9", "--port", "0", "--run")
    assert run_program("gateway", "--upstream", HOSTILE, "--run", "llava-tiny")[0] == 2
    assert run_program(*gateway, HOSTILE)[0] == 2
    assert run_program(*gateway, "llava-tiny", "--host", HOSTILE)[0] == 2


def test_report(run_directory: Path, run_program: Outcome, tmp_path: Path) -> None:
    assert run_program("report", HOSTILE, "--output", "all")[0] == 2
    folder = tmp_path / f"result{HOSTILE}".replace("/", "")
    folder.mkdir()
    (folder / "attempts.jsonl").write_text(json.dumps({HOSTILE: 1}) + "\n")
    assert run_program("report", str(folder), "--output", "all")[0] == 2


def test_map(run_directory: Path, run_program: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = CellRule(0, "allow", "seen\x1b[31m\nok")
    hostile = SafetyMap(
        ("gun", HOSTILE),
        torch.tensor([[0, 5, 1], [5, 0, 0]]),
        judging=JudgeSettings(cells=(allowed,)),
    )
    monkeypatch.setattr(map_changes, "read_map", lambda _: hostile)
    code, out, _ = run_program("map", "show", "llava-tiny")
    assert code == 0
    assert len(out.splitlines()) == 1 + 2 + 2, "the map, its categories, its cells"
    assert run_program("map", "show", HOSTILE)[0] == 2
    assert run_program("map", "diff", "llava-tiny", "--images", HOSTILE)[0] == 2
    assert run_program("map", "edit", "llava-tiny", "--threshold", HOSTILE)[0] == 2
    assert run_program("map", HOSTILE)[0] == 2


def test_a_page_of_flips(tmp_path: Path) -> None:
    path = tmp_path / HOSTILE.replace("/", "")
    try:
        Image.new("RGB", (8, 8), "red").save(path, "png")
    except (OSError, UnicodeError):
        pytest.skip("the file system takes no such name")
    before, after = Verdict(False, "neutral", 0.1, 0), Verdict(True, HOSTILE, 0.9, 0)
    flip = map_changes.Flip(path, before, after)
    write_map_page(map_changes.MapDiff(1, [flip]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert_harmless(page)
    assert "\\udcff" in page


def test_a_category_s_folder_that_no_map_can_hold(
    run_directory: Path, run_program: Outcome, tmp_path: Path
) -> None:
    for name in ("neutral", "gun\udcff"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "a.png")
    code, _, err = run_program("calibrate", "llava-tiny", "--images", "images")
    assert code == 2
    assert "not UTF-8" in err


def test_reports(install: Install, run_directory: Path, run_program: Outcome) -> None:
    def measured(*_: Any, **__: Any) -> SimpleNamespace:
        html, numbers = Path(f"{HOSTILE}.html"), Path(f"{HOSTILE}.json")
        return SimpleNamespace(
            records=[], report_html=html, report_json=numbers, weights=Path(HOSTILE)
        )

    install("recipes.evaluate", evaluate_run=measured)
    install("recipes.report.headline", format_summary=lambda _: HOSTILE.replace(FORGED, "row"))
    code, out, _ = run_program("evaluate", "llava-tiny")
    assert code == 0
    assert "Report: a\\x1b" in out
    assert run_program("evaluate", HOSTILE)[0] == 2
    assert run_program("evaluate", "llava-tiny", "--set", HOSTILE)[0] == 2
    install("recipes.retrofit", retrofit=measured)
    assert run_program("retrofit", "--model", "llava-tiny", "--output", f"new{HOSTILE}")[0] == 0
    assert run_program("retrofit", "--model", HOSTILE)[0] == 2
    assert run_program("retrofit", "--config", HOSTILE)[0] == 2
    assert run_program("retrofit", "--model", "llava-tiny", "--set", f"{HOSTILE}=1")[0] == 2
    assert run_program("retrofit", "--dry-run", "--gpu-memory", HOSTILE)[0] == 2
    assert run_program("pretrain-tiny", "--config", HOSTILE)[0] == 2
    recipe = SimpleNamespace(override=lambda _: None)
    install("recipes.pretrain_tiny", pretrain=measured, load_pretrain_recipe=lambda _: recipe)
    assert run_program("pretrain-tiny", "--output", f"base{HOSTILE}")[0] == 0


def test_export(install: Install, run_directory: Path, run_program: Outcome) -> None:
    def export_run(_run: Path, output: Path, **_: Any) -> None:
        output.mkdir()

    install("recipes.export", export_run=export_run)
    install("adapters.storage.upload", upload_guarded=lambda *_: f"https://hub/{HOSTILE}")
    code, out, _ = run_program("export", "llava-tiny", "--output", HOSTILE, "--push", "a/b")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert run_program("export", f"no{HOSTILE}", "--output", "x")[0] == 2


def test_search_plan(install: Install, run_directory: Path, run_program: Outcome) -> None:
    choice = SimpleNamespace(backend=HOSTILE, reason=HOSTILE, measured=None)
    install("recipes.search_plan", search_plans=lambda _: [("patch", 3, 4, choice)])
    assert run_program("search-plan", "llava-tiny")[0] == 0
    assert run_program("search-plan", f"no{HOSTILE}")[0] == 2


def test_models(monkeypatch: pytest.MonkeyPatch, run_program: Outcome) -> None:
    row = {"name": HOSTILE, "aliases": [HOSTILE, "[red]b"], "status": "x", "note": HOSTILE}
    monkeypatch.setattr("vqguard.cli.models._rows", lambda: [row])
    code, out, _ = run_program("models")
    assert code == 0
    assert "[red]b" in out
    code, out, _ = run_program("models", "--json")
    assert json.loads(out)["note"] == HOSTILE


def test_verify(monkeypatch: pytest.MonkeyPatch, run_program: Outcome) -> None:
    def fails(*_: Any) -> None:
        raise FailedCheckError(HOSTILE)

    monkeypatch.setattr(conformance, "CHECKS", {"probe": fails})
    code, out, _ = run_program("verify", "llava-tiny")
    assert code == 1
    assert "\\x1b[31m" in out


def test_verify_of_a_wrong_name(run_program: Outcome) -> None:
    assert run_program("verify", HOSTILE)[0] == 2
    assert run_program("verify", "--tiny", HOSTILE)[0] == 2


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_calls(name: str, run_directory: Path, run_program: Outcome) -> None:
    assert run_program(HOSTILE)[0] == 2
    assert run_program(name, f"--{HOSTILE}")[0] == 2
    assert run_program(name, "--adapter-module", HOSTILE)[0] == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImageError(HOSTILE), 2),
        (ArtefactError(HOSTILE), 2),
        (ConfigError(f"wrong:\n  - {HOSTILE}", problems=(HOSTILE,)), 2),
        (OSError(28, HOSTILE), 2),
        (FileNotFoundError(2, "No such file", HOSTILE), 2),
        (RuntimeError(HOSTILE.replace(FORGED, "photo")), 3),
        (RuntimeError("No space left on device " + HOSTILE), 2),
        (click.UsageError(HOSTILE), 2),
    ],
)
@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_errors(
    error: Exception,
    code: int,
    debug: list[str],
    run_program: Outcome,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if debug:  # a traceback quotes the message with its lines
        monkeypatch.setattr("tests.cli.test_escaping.FORGED", "\0")

    def fails() -> None:
        raise error

    monkeypatch.setattr(program, "get_command", lambda *_: click.Command("scan", callback=fails))
    assert run_program(*debug, "scan")[0] == code


def test_logs_and_warnings(
    run_program: Outcome, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def talks() -> None:
        for name in ("vqguard.recipes.x", "transformers.x"):
            handler = logging.StreamHandler()
            logger = logging.getLogger(name)
            logger.addHandler(handler)
            text = HOSTILE if name.startswith("vqguard") else HOSTILE.replace(FORGED, "b")
            logger.warning("%s", text)
            logger.removeHandler(handler)
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            print(warnings.formatwarning(HOSTILE.replace(FORGED, "b"), UserWarning, "x.py", 1))

    monkeypatch.setattr(program, "get_command", lambda *_: click.Command("scan", callback=talks))
    code, out, err = run_program("scan")
    assert code == 0
    assert err.count("\\x1b[31m") >= 2
    assert "\\x1b[31m" in out


def test_commands_print_by_one_module_only() -> None:
    printing = re.compile(r"click\.s?echo|(?<!\.)\bprint\(|sys\.std(out|err)\.write|print_exc")
    found = [
        path.name
        for path in sorted((ROOT / "cli").rglob("*.py"))
        if path.name != "output.py" and printing.search(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def test_every_command_is_driven_above() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in COMMANDS if f'run_program("{name}"' not in text] == []
