"""The page's routes: what they tell, what they refuse, and that the page loads nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from tests.recipes.conftest import MakeModel
from vqguard.cli.main import main
from vqguard.errors import ArtefactError
from vqguard.judging.verdict import DecidingRegion, Part, Reason, Verdict
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.models import save_control
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.answering.jobs import PictureCodes
from vqguard.recipes.serving.app import make_app
from vqguard.recipes.serving.audit import AuditLog
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.page import looking
from vqguard.recipes.serving.page.undefended import Undefended, open_undefended
from vqguard.recipes.serving.service import Service
from vqguard.regional.layout import Layout

from .conftest import CHAT, NAME, PICTURES, QUESTION, asking, data_uri, service_of

PICTURE, UNDEFENDED, STATE = "/ui/picture", "/ui/undefended", "/ui/state"
Page = Callable[..., TestClient]


@pytest.fixture
def page(run: LoadedRun, small_model: MakeModel, tmp_path: Path) -> Iterator[Page]:
    """Starts a server with the page, and a model without a guard if that is wanted."""
    with ExitStack() as stack:

        def start(*, undefended: bool = False, audit: bool = False, **limits: Any) -> TestClient:
            log = AuditLog(tmp_path / "audit.jsonl", "checksum") if audit else None
            service = Service(run, NAME, Limits(**limits), audit=log)
            beside = Undefended(small_model(seed=1)[0], "control") if undefended else None
            app: Any = make_app(service, page=True, undefended=beside)
            client = TestClient(app, raise_server_exceptions=False)
            stack.enter_context(client)
            return client

        yield start


def looked_at(client: TestClient, picture: Image.Image) -> Any:
    answer = client.post(PICTURE, json={"image_url": {"url": data_uri(picture)}})
    assert answer.status_code == 200, answer.text
    return answer.json()


def pieces(answer: httpx2.Response) -> list[Any]:
    lines = [line for line in answer.text.split("\n\n") if line]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_without_the_option_there_is_no_page(serve: Any) -> None:
    client = serve()
    for path in ("/", "/ui/", "/ui/page.js", STATE):
        assert client.get(path).status_code == 404
    assert client.post(PICTURE, json={}).status_code == 404


def test_the_page_loads_nothing_from_elsewhere(page: Page) -> None:
    client = page()
    assert str(client.get("/").url).endswith("/ui/")
    html = client.get("/ui/")
    names = re.findall(r'(?:src|href)="([^"]*)"', html.text)
    assert {"page.css", "page.js", "icon.svg"} <= set(names)
    assert not re.search(r"style=|<style|<script(?![^>]*src=)|\son\w+=", html.text)
    scripts = {"page.js", "api.js", "codes.js", "verdict.js"}
    for name in {*names, *scripts}:
        answer = client.get(f"/ui/{name}")
        assert answer.status_code == 200
        code = re.sub(r"(?m)(^|\s)//.*$|http://www.w3.org/2000/svg", "", answer.text)
        assert "//" not in code
        assert "innerHTML" not in answer.text
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/ui/../service.py", "/ui/%2e%2e/looking.py", "/ui/nothing"):
        assert client.get(path).status_code == 404


def test_all_is_told_of_a_picture(page: Page, run: LoadedRun, flagged: list[bool]) -> None:
    client = page()
    safety_map = run.model.vqguard.safety_map
    for picture, bad, verdict in zip(PICTURES, flagged, run.screen_images(PICTURES), strict=True):
        reply = looked_at(client, picture)
        assert (reply["width"], reply["height"]) == picture.size
        chat = client.post(CHAT, json=asking(picture)).json()
        assert reply["guard"] == chat["guard"]
        assert reply["guard"]["pictures"][0]["flagged"] == bad
        score = reply["categories"]["gun"]
        expected = safety_map.category_scores(torch.tensor([verdict.codes])).item()
        assert score == {"score": expected, "threshold": safety_map.tau}
        assert (score["score"] > score["threshold"]) == bad
        assert reply["any_category"]["threshold"] == safety_map.tau
        (grid,) = reply["grids"]
        features = run.model.get_image_features(
            **run.image_processor(images=picture, return_tensors="pt")
        )
        words = torch.cat(list(features.pooler_output)).flatten(0, -2)
        known = run.model.vqguard.patch.codebook.weight[grid["codes"]]
        assert torch.equal(words, known.to(words))
        assert grid["rows"] * grid["columns"] == len(grid["codes"])
        assert reply["codebook"] == 32


def test_own_thresholds(page: Page, run: LoadedRun) -> None:
    own = run.model.vqguard.safety_map
    run.model.vqguard.safety_map = own.with_judging(thresholds={"gun": 0.25})
    reply = looked_at(page(), PICTURES[0])
    assert reply["categories"]["gun"]["threshold"] == 0.25
    assert reply["any_category"] is None


def test_codes_lie_on_their_grids() -> None:
    layout: Layout = ((2, 3), (1, 2))
    grids = looking._grids(PictureCodes(tuple(range(8)), layout))
    assert [(g.rows, g.columns, g.codes) for g in grids] == [
        (2, 3, [0, 1, 2, 3, 4, 5]),
        (1, 2, [6, 7]),
    ]
    (unknown,) = looking._grids(PictureCodes(tuple(range(7)), None))
    assert (unknown.rows, unknown.columns, len(unknown.codes)) == (4, 2, 7)


def test_where_the_region_lies(serve: Any) -> None:
    service = service_of(serve())

    def box(part: Part) -> looking.Box | None:
        region = DecidingRegion(part, 0, top=0.25, left=0.5, bottom=0.75, right=1.0)
        reason = Reason("gun", 1.0, 0.5, 0, 0, "refuse", "version", region)
        return looking._box(service, Verdict(True, "gun", 1.0, 0, reason=reason), (96, 96))

    assert box("picture") == looking.Box(left=0.5, top=0.25, right=1.0, bottom=0.75)
    assert box("tile") is None
    assert looking._box(service, Verdict(False, "neutral", 0.1, 0), (96, 96)) is None


@pytest.mark.parametrize(
    ("url", "status", "says"),
    [
        ("data:image/png;base64,AAAA", 400, "picture"),
        ("data:text/html;base64,AAAA", 400, "data:image"),
        ("https://example.org/a.png", 400, "fetches no pictures"),
        ("data:image/png;base64,%%%", 400, "base64"),
    ],
)
def test_what_is_no_picture(page: Page, url: str, status: int, says: str) -> None:
    answer = page().post(PICTURE, json={"image_url": {"url": url}})
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


def test_limits_hold_here_too(page: Page) -> None:
    client = page(pixels=4000, body_bytes=60_000)
    large = {"image_url": {"url": data_uri(PICTURES[0])}}
    assert client.post(PICTURE, json=large).status_code == 400
    assert client.get(STATE).json()["picture_bytes"] < 60_000
    huge = {"image_url": {"url": "data:image/png;base64," + "A" * 60_000}}
    assert client.post(PICTURE, json=huge).status_code == 413


def test_it_is_written_down(page: Page, tmp_path: Path) -> None:
    client = page(audit=True)
    looked_at(client, PICTURES[0])
    (line,) = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert json.loads(line)["picture"] == 0


def test_what_is_served(page: Page, run: LoadedRun) -> None:
    state = page(undefended=True).get(STATE).json()
    assert state["model"] == NAME
    assert state["map_version"] == run.model.vqguard.safety_map.version
    assert (state["undefended"], state["shadow"]) == ("control", False)
    client = page()
    assert client.get(STATE).json()["undefended"] is None
    assert client.post(UNDEFENDED, json=asking(PICTURES[0])).status_code in (404, 405)


def test_the_undefended_model_answers_what_the_guard_refuses(
    page: Page, small_model: MakeModel, flagged: list[bool]
) -> None:
    client = page(undefended=True)
    bare, processor = small_model(seed=1)
    picture = PICTURES[flagged.index(True)]
    refused = client.post(CHAT, json=asking(picture)).json()
    assert refused["choices"][0]["finish_reason"] == "content_filter"
    events = pieces(client.post(UNDEFENDED, json=asking(picture)))
    assert events[-1]["end"] in ("stop", "length")
    said = "".join(event.get("piece", "") for event in events)
    text = prompt_text(processor, QUESTION, picture=True)
    inputs = processor(images=[picture], text=[text], return_tensors="pt")
    output = bare.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert said == processor.tokenizer.decode(new, skip_special_tokens=True)
    wrong = client.post(UNDEFENDED, json=asking(picture, tools=[{}]))
    assert wrong.status_code == 400


def test_a_failure_of_the_undefended_model_is_said(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = page(undefended=True)

    def fail(*_: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(Undefended, "_generate", fail)
    answer = client.post(UNDEFENDED, json=asking(PICTURES[0]))
    assert pieces(answer)[-1]["error"]["message"] == "the undefended model failed"
    assert "secret" not in answer.text
    monkeypatch.undo()
    assert "end" in pieces(client.post(UNDEFENDED, json=asking(PICTURES[0])))[-1]


def test_which_model_is_undefended(small_model: MakeModel, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="finetuned_control"):
        open_undefended(tmp_path, "control")
    with pytest.raises(ArtefactError, match=r"recipe\.yaml"):
        open_undefended(tmp_path, "base")
    model, _ = small_model()
    save_control(tmp_path, model)
    opened = open_undefended(tmp_path, "control")
    assert opened.kind == "control"
    assert not hasattr(opened.model, "vqguard")


def test_options_that_contradict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path), "--undefended", "control"]) == 2
    assert "--ui" in capsys.readouterr().err
    assert main(["serve", str(tmp_path), "--ui", "--no-reasons"]) == 2
    assert "every score" in capsys.readouterr().err
