"""LiteLLM's generic guardrail API: what its proxy asks, and what its class makes of the answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard.recipes.run import LoadedRun, save_run_model

from .conftest import NAME, PICTURES, Serve, data_uri
from .test_contract import ended, serving

PATH = "/beta/litellm_basic_guardrail_api"


def asked(*images: str, **fields: Any) -> dict[str, Any]:
    """As LiteLLM 1.110 sends it."""
    return {
        "input_type": "request",
        "litellm_call_id": "1",
        "texts": ["what is it ?"],
        "images": list(images),
        "request_data": {"user_api_key_hash": None},
        "model": "gpt",
        **fields,
    }


def told(serve: Serve, body: dict[str, Any], **options: Any) -> dict[str, Any]:
    answer = serve(**options).post(PATH, json=body)
    assert answer.status_code == 200
    reply: dict[str, Any] = answer.json()
    return reply


def test_flagged_pictures_block(serve: Serve, flagged: list[bool]) -> None:
    client = serve()
    for picture, bad in zip(PICTURES, flagged, strict=True):
        answer = client.post(PATH, json=asked(data_uri(picture))).json()
        assert answer["action"] == ("BLOCKED" if bad else "NONE")
        assert ("gun" in (answer["blocked_reason"] or "")) == bad
    assert client.post(PATH, json=asked()).json()["action"] == "NONE"


def message(*parts: Any) -> dict[str, Any]:
    return {"structured_messages": [{"role": "user", "content": list(parts)}]}


def test_pictures_that_were_left_in_the_messages(serve: Serve, flagged: list[bool]) -> None:
    bad = data_uri(PICTURES[flagged.index(True)])
    for part in (
        {"type": "image_url", "image_url": {"url": bad}},
        {"type": "image_url", "image_url": bad},
    ):
        assert told(serve, asked(**message(part)))["action"] == "BLOCKED"
    talk = {"type": "text", "text": "hello"}
    assert told(serve, asked(**message(talk, {"type": "input_audio"})))["action"] == "NONE"


@pytest.mark.parametrize(
    "part",
    [{"type": "video_url", "video_url": {"url": "x"}}, {"type": "file"}, {"type": "image"}, 1, {}],
)
def test_what_cannot_be_judged_blocks(serve: Serve, part: Any) -> None:
    assert told(serve, asked(**message(part)))["action"] == "BLOCKED"


def test_pictures_that_cannot_be_judged_block(serve: Serve) -> None:
    picture = PICTURES[0]
    two = Image.merge("RGBA", (*picture.split(), Image.new("L", picture.size, 128)))
    many = [data_uri(Image.new("RGB", (8, 8), (n, 0, 0))) for n in range(9)]
    for images in (["https://example.org/a.png"], ["data:,"], [data_uri(two)], many):
        answer = told(serve, asked(*images))
        assert answer["action"] == "BLOCKED"
        assert answer["blocked_reason"]


@pytest.mark.slow
@pytest.mark.alone
def test_litellms_own_class(run: LoadedRun, flagged: list[bool], tmp_path: Path) -> None:
    module = pytest.importorskip(
        "litellm.proxy.guardrails.guardrail_hooks.generic_guardrail_api.generic_guardrail_api"
    )
    save_run_model(tmp_path / NAME, run.model, run.processor)
    with serving(tmp_path / NAME) as (address, process):
        guardrail = module.GenericGuardrailAPI(api_base=address, guardrail_name="vqguard")

        def ask(picture: Image.Image) -> None:
            inputs = {"texts": ["what is it ?"], "images": [data_uri(picture)]}
            asyncio.run(guardrail.apply_guardrail(inputs, {"model": "gpt"}, "request"))

        for picture, bad in zip(PICTURES, flagged, strict=True):
            if bad:
                with pytest.raises(Exception, match="flagged by the guard"):
                    ask(picture)
            else:
                ask(picture)
        assert ended(process) == 0
