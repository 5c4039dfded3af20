"""`/v1/chat/completions`: the model's own answers, its refusals, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from PIL import Image

from vqguard.recipes.run import LoadedRun

from .conftest import CHAT, NAME, PICTURES, QUESTION, Serve, asking, data_uri, service_of

REFUSED = "sorry ."


def said(answer: Any) -> str:
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


def events(answer: Any) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_answers_are_those_of_ask(serve: Serve, run: LoadedRun, flagged: list[bool]) -> None:
    client = serve()
    for picture, refused in zip(PICTURES, flagged, strict=True):
        answer = client.post(CHAT, json=asking(picture))
        alone = run.ask(picture, QUESTION, max_new_tokens=6)
        assert answer.status_code == 200
        assert said(answer) == alone.text
        choice, guard = answer.json()["choices"][0], answer.json()["guard"]
        assert (choice["finish_reason"] == "content_filter") == refused
        assert (said(answer) == REFUSED) == refused
        (judged,) = guard["pictures"]
        assert judged["flagged"] == refused
        if refused:
            assert alone.verdict.reason is not None
            assert judged["category"] == "gun"
            assert judged["score"] == alone.verdict.reason.score
            assert judged["threshold"] == alone.verdict.reason.threshold
            assert guard["map_version"] == alone.verdict.reason.map_version
        else:
            assert judged["score"] is judged["category"] is None


def test_a_flagged_picture_refuses_wherever_it_stands(serve: Serve, flagged: list[bool]) -> None:
    client = serve()
    clean, bad = PICTURES[flagged.index(False)], PICTURES[flagged.index(True)]
    answer = client.post(CHAT, json=asking(clean, bad, clean)).json()
    assert [p["flagged"] for p in answer["guard"]["pictures"]] == [False, True, False]
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    history = asking(bad)["messages"] + [
        {"role": "assistant", "content": "a dog ."},
        {"role": "user", "content": "and now ?"},
    ]
    answer = client.post(CHAT, json={"model": NAME, "messages": history}).json()
    assert answer["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("fields", [{}, {"stop": ["o"]}, {"temperature": 1.0, "seed": 5}])
def test_a_stream_is_the_answer(serve: Serve, flagged: list[bool], fields: Any) -> None:
    client = serve()
    for picture in PICTURES[:6]:
        whole = client.post(CHAT, json=asking(picture, **fields)).json()
        options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
        answer = client.post(CHAT, json=asking(picture, **fields, **options))
        assert answer.headers["content-type"].startswith("text/event-stream")
        *pieces, last, usage = events(answer)
        text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
        assert text == whole["choices"][0]["message"]["content"]
        assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
        assert last["guard"] == whole["guard"]
        assert usage["usage"] == whole["usage"]
        assert usage["choices"] == []


def test_an_answer_ends_where_it_is_asked_to(serve: Serve, flagged: list[bool]) -> None:
    client = serve()
    clean = PICTURES[flagged.index(False)]
    drawn: dict[str, Any] = {
        "temperature": 1.0,
        "seed": 1,
    }  # an untrained model's likeliest words are none
    answer = client.post(CHAT, json=asking(clean, **drawn)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 6
    text = answer["choices"][0]["message"]["content"]
    stop = text[len(text) // 2 :][:2]
    stopped = client.post(CHAT, json=asking(clean, **drawn, stop=stop)).json()["choices"][0]
    assert stopped["finish_reason"] == "stop"
    assert stopped["message"]["content"] == text[: text.index(stop)]


def test_sampling_has_its_own_randomness(serve: Serve, flagged: list[bool]) -> None:
    client = serve()
    clean = PICTURES[flagged.index(False)]
    drawn = [
        said(client.post(CHAT, json=asking(clean, temperature=2.0, seed=seed)))
        for seed in (1, 1, 2, 3)
    ]
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) > 1
    greedy = said(client.post(CHAT, json=asking(clean)))
    sharp = asking(clean, temperature=2.0, top_p=1e-6, seed=4)
    assert said(client.post(CHAT, json=sharp)) == greedy


def test_without_reasons_no_score_is_told(serve: Serve, flagged: list[bool]) -> None:
    client = serve(reasons=False)
    answer = client.post(CHAT, json=asking(PICTURES[flagged.index(True)])).json()
    assert answer["choices"][0]["finish_reason"] == "content_filter"
    (judged,) = answer["guard"]["pictures"]
    assert judged["flagged"]
    assert judged["score"] is judged["threshold"] is judged["category"] is None


def with_message(**message: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": [message]}


def picture_part(url: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}


SMALL = Image.new("RGB", (8, 8), "red")
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no message": ({"model": NAME, "messages": []}, 400, "messages"),
    "a role": (with_message(role="tool", content="x"), 400, "messages.0"),
    "an empty message": (with_message(role="user", content="  "), 400, "messages"),
    "another model": ({**asking(SMALL), "model": "x"}, 404, "model"),
    "two answers": (asking(SMALL, n=2), 400, "n"),
    "tools": (asking(SMALL, tools=[{"type": "function"}]), 400, "tools"),
    "a field": (asking(SMALL, prompt_embeds="x"), 400, "prompt_embeds"),
    "processor arguments": (asking(SMALL, mm_processor_kwargs={}), 400, "mm_processor_kwargs"),
    "an address": (with_message(**picture_part("https://example.org/a.png")), 400, "messages.0"),
    "a file's address": (with_message(**picture_part("file:///etc/passwd")), 400, "messages.0"),
    "not base64": (with_message(**picture_part("data:image/png;base64,*")), 400, "messages.0"),
    "no picture": (with_message(**picture_part("data:image/png;base64,AAAA")), 400, "messages.0"),
    "a picture of the system": (
        with_message(**{**picture_part(data_uri(SMALL)), "role": "system"}),
        400,
        "messages.0",
    ),
    "half a character": (with_message(role="user", content="\ud800"), 400, "messages"),
    "a long answer": (asking(SMALL, max_tokens=10_000), 400, "max_tokens"),
    "no tokens": (asking(SMALL, max_tokens=0), 400, "max_tokens"),
    "a late system": (
        {
            "model": NAME,
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "system", "content": "b"},
            ],
        },
        400,
        "messages",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_served_is_refused_by_name(serve: Serve, case: str) -> None:
    body, status, param = WRONG[case]
    content = json.dumps(body).encode()
    answer = serve().post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"]
    assert str(error["param"]).startswith(param)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"]
)
def test_what_is_not_a_request_is_a_400(serve: Serve, content: bytes) -> None:
    answer = serve().post(CHAT, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_form_of_a_page_elsewhere_is_no_request(serve: Serve) -> None:
    """A browser sends text/plain anywhere without asking."""
    body = json.dumps(asking(SMALL))
    answer = serve().post(CHAT, content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 400


def test_limits(serve: Serve) -> None:
    client = serve(
        body_bytes=40_000, pictures=2, pixels=20_000, prompt_tokens=40, new_tokens=5, messages=2
    )
    picture = Image.new("RGB", (100, 100))

    def status(body: dict[str, Any]) -> tuple[int, str]:
        answer = client.post(CHAT, json={**body, "max_tokens": 5})
        return answer.status_code, answer.json().get("error", {}).get("message", "")

    assert status(asking(SMALL, SMALL, SMALL)) == (413, "pictures: at most 2 are accepted")
    assert status(asking(Image.new("RGB", (300, 300))))[0] == 400
    assert status(asking(picture, picture, question="a"))[0] != 413
    assert "pixels" in status(asking(Image.new("RGB", (100, 101)), picture))[1]
    assert status(asking(SMALL, question="a " * 20_000))[0] == 413
    assert "40" in status(asking(question="dog " * 45))[1]
    assert status(asking(question="a" * 5_000))[0] == 413
    assert status({"model": NAME, "messages": asking()["messages"] * 3})[0] == 413
    assert client.post(CHAT, json=asking(SMALL, max_tokens=6)).status_code == 400
    said_nothing = {k: v for k, v in asking(question="dog").items() if k != "max_tokens"}
    assert client.post(CHAT, json=said_nothing).json()["usage"]["completion_tokens"] == 5
    assert service_of(client).engine.alive
