"""The other routes: moderations, models, health, metrics."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from PIL import Image

from vqguard.recipes.run import LoadedRun

from .conftest import CHAT, NAME, PICTURES, Serve, asking, data_uri

MODERATIONS = "/v1/moderations"


def shown(*urls: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls]


def test_pictures_are_judged(serve: Serve, run: LoadedRun, flagged: list[bool]) -> None:
    client = serve()
    for picture, bad in zip(PICTURES, flagged, strict=True):
        answer = client.post(MODERATIONS, json={"input": shown(data_uri(picture))})
        (result,) = answer.json()["results"]
        assert result["flagged"] == bad
        assert result["categories"] == {"ambiguous": False, "gun": bad}
        (verdict,) = run.screen_images([picture])
        assert result["category_scores"]["gun"] == (verdict.probability if bad else 0.0)
        assert result["category_applied_input_types"]["gun"] == ["image"]
    parts = [*shown(*map(data_uri, PICTURES[:8])), {"type": "text", "text": "hello"}]
    body = {"input": parts, "model": "omni-moderation-latest"}
    (result,) = client.post(MODERATIONS, json=body).json()["results"]
    assert [p["flagged"] for p in result["guard"]["pictures"]] == flagged[:8]


def test_texts_are_not_judged(serve: Serve) -> None:
    client = serve()
    for given, results in (("a", 1), (["a", "b"], 2), ([{"type": "text", "text": "a"}], 1)):
        answer = client.post(MODERATIONS, json={"input": given}).json()
        assert [r["flagged"] for r in answer["results"]] == [False] * results
        assert answer["results"][0]["category_applied_input_types"]["gun"] == []


def test_a_file_that_shows_two_pictures_is_flagged(serve: Serve, flagged: list[bool]) -> None:
    """A chat shows the model what was judged; a moderation cannot know what will be shown."""
    two = Image.merge("RGBA", (*PICTURES[0].split(), Image.new("L", PICTURES[0].size, 128)))
    client = serve()
    answer = client.post(MODERATIONS, json={"input": shown(data_uri(two))})
    (result,) = answer.json()["results"]
    assert result["flagged"]
    assert result["categories"]["ambiguous"]
    assert "another picture" in result["guard"]["pictures"][0]["ambiguous"]
    assert client.post(CHAT, json=asking(two)).status_code == 200
    tiff = client.post(MODERATIONS, json={"input": shown(data_uri(two.convert("RGB"), "TIFF"))})
    assert tiff.status_code == 400


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"input": []}, 400),
        ({"input": shown("https://example.org/a.png")}, 400),
        ({"input": shown("data:image/png;base64,AAAA")}, 400),
        ({"input": "a", "model": "another"}, 404),
        ({"input": "a", "surprise": 1}, 400),
        ({}, 400),
    ],
)
def test_wrong_moderations(serve: Serve, body: dict[str, Any], status: int) -> None:
    answer = serve().post(MODERATIONS, json=body)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_models_health_and_metrics(serve: Serve, run: LoadedRun, flagged: list[bool]) -> None:
    client = serve()
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == NAME
    assert client.get(f"/v1/models/{NAME}").json() == model
    assert client.get("/v1/models/other").status_code == 404
    health = client.get("/health").json()
    assert health["map_version"] == run.model.vqguard.safety_map.version
    for picture in PICTURES[:4]:
        client.post(CHAT, json=asking(picture))
    page = client.get("/metrics").text
    assert f'vqguard_requests_total{{path="{CHAT}",status="200"}} 4.0' in page
    refused = sum(flagged[:4])
    assert f'vqguard_verdicts_total{{action="refuse",category="gun"}} {float(refused)}' in page
    assert "vqguard_batch_jobs_count 4.0" in page
    assert client.get("/nowhere").status_code == 404
    assert client.get(CHAT).status_code == 405


def test_fetched_pictures_are_answered_about(serve: Serve, flagged: list[bool]) -> None:
    async def fetch(url: str, param: str) -> bytes:
        assert param == "messages.0.content.0"
        return base64.b64decode(data_uri(PICTURES[int(url)]).partition(",")[2])

    client = serve(fetch=fetch)
    for number, bad in enumerate(flagged):
        body = asking(PICTURES[0])
        body["messages"][0]["content"][0]["image_url"]["url"] = str(number)
        answer = client.post(CHAT, json=body).json()
        assert (answer["choices"][0]["finish_reason"] == "content_filter") == bad
