"""The audit log, shadow mode, and a map that changes while requests are served."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from vqguard.cli.main import main
from vqguard.errors import ChecksumError, ConfigError, DataError
from vqguard.judging.policies import Action, Policy
from vqguard.recipes.judging.logged_verdicts import diff_log
from vqguard.recipes.judging.map_changes import MapEdit, edit_map, read_map
from vqguard.recipes.run import LoadedRun, model_checksum, open_run, save_run_model
from vqguard.recipes.serving.app import make_app
from vqguard.recipes.serving.audit import AuditLog
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.pictures import data_uri_bytes
from vqguard.recipes.serving.reloading import reloader
from vqguard.recipes.serving.service import Service

from .conftest import CHAT, NAME, PICTURES, asking, data_uri, service_of
from .test_contract import WAIT, ended, serving


@pytest.fixture
def audited(run: LoadedRun, tmp_path: Path) -> Iterator[Any]:
    """Starts the application with an audit log at `tmp_path / "audit.jsonl"`."""
    with ExitStack() as stack:

        def start(*, shadow: bool = False) -> TestClient:
            audit = AuditLog(tmp_path / "audit.jsonl", "checksum")
            service = Service(run, NAME, Limits(), audit=audit, shadow=shadow)
            app: Any = make_app(service)
            client = TestClient(app, raise_server_exceptions=False)
            client.app_state["service"] = service
            stack.enter_context(client)
            return client

        yield start


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def finish(answer: httpx2.Response) -> str:
    reason: str = answer.json()["choices"][0]["finish_reason"]
    return reason


def test_every_picture_has_its_line(
    audited: Any, run: LoadedRun, flagged: list[bool], tmp_path: Path
) -> None:
    client = audited()
    answers = [client.post(CHAT, json=asking(PICTURES[n], PICTURES[n + 1])) for n in range(4)]
    shown = [{"type": "image_url", "image_url": {"url": data_uri(PICTURES[5])}}]
    client.post("/v1/moderations", json={"input": shown})
    client.post(CHAT, json=asking(question="a secret"))
    written = lines(tmp_path / "audit.jsonl")
    assert len(written) == 9
    expected = [n + k for n in range(4) for k in range(2)] + [5]
    verdicts = run.screen_images(PICTURES)
    for line, number in zip(written, expected, strict=True):
        content = data_uri_bytes(data_uri(PICTURES[number]), "")
        assert line["sha256"] == hashlib.sha256(content).hexdigest()
        assert line["action"] == ("refuse" if flagged[number] else "none")
        assert line["codes"] == list(verdicts[number].codes)
        assert line["map_version"] == run.model.vqguard.safety_map.version
        assert (line["model"], line["shadow"]) == ("checksum", False)
    assert written[0]["request"] == answers[0].headers["x-request-id"]
    assert [line["picture"] for line in written] == [0, 1] * 4 + [0]
    assert "secret" not in (tmp_path / "audit.jsonl").read_text()
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o077 == 0


def test_in_the_shadow_nothing_is_refused(
    audited: Any, run: LoadedRun, flagged: list[bool], tmp_path: Path
) -> None:
    version = run.model.vqguard.safety_map.version
    client = audited(shadow=True)
    for picture, bad in zip(PICTURES, flagged, strict=True):
        answer = client.post(CHAT, json=asking(picture))
        assert finish(answer) != "content_filter"
        judged = answer.json()["guard"]
        assert judged["map_version"] == version
        assert judged["pictures"][0]["action"] == ("report" if bad else "none")
    written = lines(tmp_path / "audit.jsonl")
    assert [line["action"] == "refuse" for line in written] == flagged
    assert all(line["shadow"] and line["map_version"] == version for line in written)


def test_a_log_is_compared_with_another_map(
    audited: Any,
    run: LoadedRun,
    flagged: list[bool],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without the pictures: what the shadow saw, by a map of tomorrow."""
    client = audited(shadow=True)
    for picture in PICTURES:
        client.post(CHAT, json=asking(picture))
    service_of(client).engine.stop()
    log = tmp_path / "audit.jsonl"
    own = service_of(client).engine.safety_map
    run.model.vqguard.safety_map = own
    save_run_model(tmp_path / NAME, run.model, run.processor)
    edit_map(tmp_path / NAME, MapEdit(policies={"gun": Policy("report")}))
    assert diff_log(log, own).flips == []
    capsys.readouterr()
    assert main(["map", "diff", str(tmp_path / NAME), "--log", str(log)]) == 0
    told = capsys.readouterr()
    assert f"{sum(flagged)} of {len(PICTURES)} pictures change." in told.err
    hashes = [line["sha256"] for line in lines(log) if line["action"] == "refuse"]
    assert [line.partition(":")[0] for line in told.out.splitlines()] == hashes
    for wrong in ("{", "{}", '{"category": "a", "action": "b", "request": "", "codes": [99]}'):
        log.write_text(wrong + "\n")
        with pytest.raises(DataError, match="line 1"):
            diff_log(log, own)
    assert main(["map", "diff", str(tmp_path / NAME)]) == 2


def test_what_cannot_be_written_is_not_answered(
    audited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = audited()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(AuditLog, "write", full)
    answer = client.post(CHAT, json=asking(PICTURES[0]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "audit")
    assert client.post(CHAT, json=asking()).status_code == 200
    monkeypatch.undo()
    assert client.post(CHAT, json=asking(PICTURES[0])).status_code == 200


def test_a_log_that_was_moved_away(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl", "")
    (tmp_path / "audit.jsonl").rename(tmp_path / "old.jsonl")
    audit.reopen()
    assert (tmp_path / "audit.jsonl").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        AuditLog(tmp_path / "nowhere" / "audit.jsonl", "")


def test_a_map_changes_under_load(
    audited: Any, run: LoadedRun, flagged: list[bool], tmp_path: Path
) -> None:
    """No request fails, and each is answered by the map whose version it carries."""
    client = audited()
    engine = service_of(client).engine
    old = engine.safety_map
    own = Policy(refusal={"en": "sorry . sorry ."})
    new = old.with_judging(policies={"gun": own}, language="en")
    bad = PICTURES[flagged.index(True)]
    said = {old.version: "sorry .", new.version: "sorry . sorry ."}
    assert len(said) == 2
    seen: list[tuple[str, str]] = []

    def ask() -> None:
        for _ in range(10):
            answer = client.post(CHAT, json=asking(bad)).json()
            text = answer["choices"][0]["message"]["content"]
            seen.append((answer["guard"]["map_version"], text))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for safety_map in (new, old):
            engine.use_map(safety_map)
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(seen) == 40
    assert all(said[version] == text for version, text in seen)
    assert len({version for version, _ in seen}) == 2
    foreign = old.__class__(old.categories, old.counts, codebook_checksum="0" * 64)
    with pytest.raises(ChecksumError):
        engine.use_map(foreign)
    assert engine.safety_map.version == old.version
    assert finish(client.post(CHAT, json=asking(bad))) == "content_filter"


def test_the_run_is_read_again(
    run: LoadedRun, tmp_path: Path, flagged: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / NAME
    save_run_model(folder, run.model, run.processor)
    checksum = model_checksum(folder)
    service = Service(open_run(folder), NAME, Limits())
    reload = reloader(service, folder)
    edit_map(folder, MapEdit(policies={"gun": Policy("report")}))
    assert model_checksum(folder) == checksum
    reload()
    assert service.engine.safety_map.version == read_map(folder).version
    assert [v.flagged for v in service.run.screen_images(PICTURES)] == [False] * len(PICTURES)
    (folder / "model" / "guard" / "guard.json").write_text("{")
    reload()
    assert "nothing was reloaded" in caplog.text
    assert service.engine.safety_map.judging.policy("gun").action == "report"


@pytest.mark.slow
@pytest.mark.alone
def test_sighup_reloads_a_server(run: LoadedRun, tmp_path: Path, flagged: list[bool]) -> None:
    folder = tmp_path / NAME
    save_run_model(folder, run.model, run.processor)
    bad = PICTURES[flagged.index(True)]
    log = tmp_path / "audit.jsonl"
    with serving(folder, "--audit", str(log)) as (address, process):
        answer = httpx2.post(address + CHAT, json=asking(bad), timeout=WAIT)
        assert finish(answer) == "content_filter"
        _, new = edit_map(folder, MapEdit(policies={"gun": Policy("report")}))
        log.rename(tmp_path / "old.jsonl")
        process.send_signal(signal.SIGHUP)
        until = time.monotonic() + WAIT
        while httpx2.get(f"{address}/health").json()["map_version"] != new.version:
            assert time.monotonic() < until
            time.sleep(0.1)
        answer = httpx2.post(address + CHAT, json=asking(bad), timeout=WAIT)
        assert finish(answer) != "content_filter"
        assert ended(process) == 0
    assert [line["action"] for line in lines(tmp_path / "old.jsonl")] == ["refuse"]
    assert [line["action"] for line in lines(log)] == ["report"]


@pytest.mark.slow
@pytest.mark.alone
def test_maps_change_under_load_and_no_request_is_lost(
    run: LoadedRun, tmp_path: Path, flagged: list[bool]
) -> None:
    """Eight clients without a pause, ten reloads: each answer is by the map that it names."""
    folder = tmp_path / NAME
    save_run_model(folder, run.model, run.processor)
    clean, bad = PICTURES[flagged.index(False)], PICTURES[flagged.index(True)]
    asks = {read_map(folder).version: "content_filter"}
    seen: list[tuple[bool, str, str]] = []
    problems: list[str] = []
    done = threading.Event()

    def client(address: str, number: int) -> None:
        with httpx2.Client(timeout=WAIT) as connection:
            turn = number
            while not done.is_set():
                turn += 1
                shown = asking((clean, bad)[turn % 2], stream=turn % 3 == 0)
                try:
                    seen.append((turn % 2 == 1, *_verdict(connection, address, shown)))
                except Exception as error:
                    problems.append(repr(error))

    with serving(folder) as (address, process):
        threads = [threading.Thread(target=client, args=(address, n)) for n in range(8)]
        for thread in threads:
            thread.start()
        for turn in range(6):
            _more(seen, problems)
            action: Action = "report" if turn % 2 == 0 else "refuse"
            _, new = edit_map(folder, MapEdit(policies={"gun": Policy(action)}))
            asks[new.version] = "other" if action == "report" else "content_filter"
            process.send_signal(signal.SIGHUP)
            until = time.monotonic() + WAIT
            while _served(address) != new.version:
                assert time.monotonic() < until
        _more(seen, problems)
        done.set()
        for thread in threads:
            thread.join(WAIT)
        assert ended(process) == 0
    assert problems == []
    assert len(seen) >= 7 * 16
    for was_bad, version, ending in seen:
        refused = ending == "content_filter"
        assert refused == (was_bad and asks[version] == "content_filter")
    assert {version for _, version, _ in seen} == set(asks)


def _more(seen: list[Any], problems: list[str]) -> None:
    """Wait for answers of which some were asked for after this call."""
    before = len(seen)
    while len(seen) < before + 16 and not problems:
        time.sleep(0.05)


def _served(address: str) -> str:
    version: str = httpx2.get(f"{address}/health", timeout=WAIT).json()["map_version"]
    return version


def _verdict(connection: httpx2.Client, address: str, body: dict[str, Any]) -> tuple[str, str]:
    """The map's version that an answer names, and how the answer ended."""
    answer = connection.post(address + CHAT, json=body)
    assert answer.status_code == 200, answer.text
    if not body["stream"]:
        document = answer.json()
        return document["guard"]["map_version"], document["choices"][0]["finish_reason"]
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    last = json.loads(events[-2])
    return last["guard"]["map_version"], last["choices"][0]["finish_reason"]


@pytest.mark.slow
@pytest.mark.alone
def test_what_the_shadow_saw_by_another_map(
    run: LoadedRun, tmp_path: Path, flagged: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """From `vqguard serve --shadow` to `vqguard map diff --log`, as the documentation has it.

    What the comparison says of a map is what a server of that map then does.
    """
    folder, log = tmp_path / NAME, tmp_path / "audit.jsonl"
    save_run_model(folder, run.model, run.processor)
    with serving(folder, "--shadow", "--audit", str(log)) as (address, process):
        for picture in PICTURES:
            answer = httpx2.post(address + CHAT, json=asking(picture), timeout=WAIT)
            assert finish(answer) != "content_filter"
        assert ended(process) == 0
    capsys.readouterr()
    assert main(["map", "diff", str(folder), "--log", str(log)]) == 0
    assert f"0 of {len(PICTURES)} pictures change." in capsys.readouterr().err
    cells = [line["codes"][0] for line in lines(log)]
    forbidden = cells[flagged.index(False)]
    edit = ["map", "edit", str(folder), "--forbid", f"{forbidden}=gun", "--reason", "tried"]
    assert main(edit) == 0
    capsys.readouterr()
    assert main(["map", "diff", str(folder), "--log", str(log)]) == 0
    told = capsys.readouterr()
    changed = [cell == forbidden and not bad for cell, bad in zip(cells, flagged, strict=True)]
    assert f"{sum(changed)} of {len(PICTURES)} pictures change." in told.err
    named = {line.partition(":")[0] for line in told.out.splitlines()}
    hashes = [line["sha256"] for line in lines(log)]
    assert named == {h for h, is_changed in zip(hashes, changed, strict=True) if is_changed}
    with serving(folder) as (address, process):
        for picture, bad, is_changed in zip(PICTURES, flagged, changed, strict=True):
            answer = httpx2.post(address + CHAT, json=asking(picture), timeout=WAIT)
            assert (finish(answer) == "content_filter") == (bad or is_changed)
        assert ended(process) == 0
