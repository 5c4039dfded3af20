"""Pictures of several requests are looked at together, and no request is the worse for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters.sizes.pictures import open_processor
from vqguard.adapters.vllm_engine.judging import PictureJudge
from vqguard.adapters.vllm_engine.waiting import Line, Waiting, whose_turn

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
Sorted = tuple[list[Image.Image], list[Image.Image]]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each look was at."""
    counts: list[int] = []
    original = PictureJudge.look_at

    def look_at(self: PictureJudge, inputs: Any, pictures: int) -> Any:
        counts.append(pictures)
        return original(self, inputs, pictures)

    monkeypatch.setattr(PictureJudge, "look_at", look_at)
    return counts


@pytest.fixture(scope="module")
def question(llava_folder: Path) -> str:
    content = [{"type": "image"}, {"type": "text", "text": "what is in the image ?"}]
    text: str = open_processor(llava_folder).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return text


@pytest.fixture
def answers(engine: Any, question: str) -> Any:
    """Pictures, one a request -> the answers; nothing is known of them from before."""
    from vllm import SamplingParams  # not everybody has it

    def ask(*pictures: Any) -> list[str]:
        engine.llm_engine.reset_mm_cache()
        prompts = [{"prompt": question, "multi_modal_data": {"image": shown}} for shown in pictures]
        params = SamplingParams(temperature=0, max_tokens=24)
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return ask


def test_a_batch_is_looked_at_together_and_answered_as_one_by_one(
    answers: Any, pictures: list[Image.Image], looks: list[int]
) -> None:
    shown = pictures[:20]
    alone = [answers(picture)[0] for picture in shown]
    assert looks == [1] * 20
    looks.clear()
    assert answers(*shown) == alone
    assert looks == [16, 4]


def test_conversations_of_a_chat_are_looked_at_together(
    engine: Any, pictures: list[Image.Image], looks: list[int]
) -> None:
    from vllm import SamplingParams  # not everybody has it

    def ask(shown: list[Image.Image]) -> list[str]:
        engine.llm_engine.reset_mm_cache()
        conversations = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_pil", "image_pil": picture},
                        {"type": "text", "text": "what is in the image ?"},
                    ],
                }
            ]
            for picture in shown
        ]
        params = SamplingParams(temperature=0, max_tokens=24)
        outputs = engine.chat(conversations, params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    shown = pictures[:20]
    alone = [ask([picture])[0] for picture in shown]
    assert looks == [1] * 20
    looks.clear()
    assert ask(shown) == alone
    assert looks == [16, 4]
    assert engine.renderer.mm_processor.line.behind() == []


def test_pictures_are_normalised_together_as_alone(
    engine: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of one size in one go, to the bit; a picture of another size by itself."""
    processor = engine.renderer.mm_processor
    shown = [*pictures[:5], pictures[5].resize((80, 64))]
    requests = [[shown[0]], [shown[1], shown[2]], [shown[3]], [shown[5]], [shown[4]]]
    of_each = [processor.info.parse_mm_data({"image": images}) for images in requests]
    alone = [processor._normalised(items, {}).data for items in of_each]
    counts: list[int] = []
    original = type(processor)._normalised

    def _normalised(self: Any, items: Any, given: Any) -> Any:
        counts.append(items.get_count("image"))
        return original(self, items, given)

    monkeypatch.setattr(type(processor), "_normalised", _normalised)
    asked = [(Waiting(None), items) for items in of_each]
    processor._prepare(asked)
    assert sorted(counts) == [1, 5]
    for (request, _), expected, images in zip(asked, alone, requests, strict=True):
        assert request.prepared.count == len(images)
        data = request.prepared.data
        assert data.keys() == expected.keys()
        assert all(torch.equal(data[name], expected[name]) for name in expected)


def test_several_pictures_of_a_request_go_together(
    answers: Any, pictures: list[Image.Image], looks: list[int], engine: Any, question: str
) -> None:
    """A picture that came before is not looked at again."""
    from vllm import SamplingParams  # not everybody has it

    engine.llm_engine.reset_mm_cache()
    one, two, three = pictures[0], pictures[2], pictures[4]
    prompts = [
        {"prompt": question, "multi_modal_data": {"image": one}},
        {"prompt": "<image> <image> " + question, "multi_modal_data": {"image": [two, one, three]}},
        {"prompt": question, "multi_modal_data": {"image": three}},
    ]
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert looks == [3]


def test_where_looking_together_fails_each_is_looked_at_alone(
    answers: Any, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = answers(*pictures[:4])
    original, counts = PictureJudge.look_at, []

    def look_at(self: PictureJudge, inputs: Any, pictures: int) -> Any:
        counts.append(pictures)
        if pictures > 1:
            raise RuntimeError("out of memory")
        return original(self, inputs, pictures)

    monkeypatch.setattr(PictureJudge, "look_at", look_at)
    assert answers(*pictures[:4]) == alone
    assert counts == [4, 1, 1, 1, 1]


def test_a_broken_picture_is_its_own_request_s(
    engine: Any, answers: Any, sorted_pictures: Sorted, looks: list[int]
) -> None:
    flagged, clean = sorted_pictures[0][0], sorted_pictures[1][0]
    from vllm.exceptions import VLLMValidationError  # not everybody has it

    with pytest.raises(VLLMValidationError):
        answers(clean, flagged, "no picture")
    looks.clear()
    assert answers(clean, flagged) == [answers(clean)[0], answers(flagged)[0]]
    assert looks == [2, 1, 1]


def test_a_picture_that_changed_while_it_waited_is_looked_at_again(
    answers: Any, sorted_pictures: Sorted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was seen of it belongs to the pixels that it had."""
    flagged, clean = sorted_pictures[0][0], sorted_pictures[1][0]
    refusal, waits = answers(flagged)[0], sorted_pictures[1][1].copy()
    original, counts = PictureJudge.look_at, []

    def look_at(self: PictureJudge, inputs: Any, pictures: int) -> Any:
        counts.append(pictures)
        seen = original(self, inputs, pictures)
        waits.paste(flagged)
        return seen

    monkeypatch.setattr(PictureJudge, "look_at", look_at)
    assert answers(clean, waits)[1] == refusal
    assert counts == [2, 1]


def test_requests_of_a_server_are_looked_at_together(
    engine: Any, pictures: list[Image.Image], looks: list[int], question: str
) -> None:
    renderer = engine.renderer
    engine.llm_engine.reset_mm_cache()
    ids = renderer.tokenizer.encode(question)
    prompts = [
        {"prompt_token_ids": ids, "multi_modal_data": {"image": shown}} for shown in pictures[:6]
    ]

    async def all_at_once() -> Any:
        return await asyncio.gather(*(renderer._process_tokens_async(p) for p in prompts))

    made = asyncio.run(all_at_once())
    assert [given["type"] for given in made] == ["multimodal"] * 6
    assert sum(looks) == 6
    assert len(looks) <= 2  # the thread may take the first before the others have come
    assert renderer.mm_processor.line.behind() == []


def test_who_leaves_the_line_is_not_looked_at() -> None:
    line = Line()
    first, second = {"image": 1}, {"image": 2}
    with line.standing([first, second]):
        assert [waiting.data for waiting in line.behind()] == [first, second]
        with line.turn(first):
            assert whose_turn() is not None
            assert [waiting.data for waiting in line.behind()] == [second]
        with line.turn({"image": 2}):  # equal, and another one
            assert whose_turn() is None
    assert line.behind() == []
    assert whose_turn() is None
