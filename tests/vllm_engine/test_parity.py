"""vLLM's answers and verdicts are those of the guarded model in transformers, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import load_guarded
from vqguard.adapters.sizes.pictures import open_processor

from .conftest import BACKEND, MakeEngine, make_qwen, noise

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
LENGTH = 24
QUESTIONS = (
    "what is in the image ?",
    "how many things are in the image ?",
    "what colour is the background ?",
    "list everything in the image .",
)
Request = tuple[str, list[Image.Image]]


def llava_requests(processor: Any, pictures: list[Image.Image]) -> list[Request]:
    """84 of them: about one picture, two, three and none; some pictures come again."""
    asked = []
    for i in range(84):
        count = (1, 1, 1, 2, 1, 0, 3)[i % 7]
        shown = [pictures[(5 * i + 11 * k) % len(pictures)] for k in range(count)]
        content = [{"type": "image"}] * count + [
            {"type": "text", "text": QUESTIONS[i % len(QUESTIONS)]}
        ]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        asked.append((text, shown))
    return asked


def expected(model: Any, processor: Any, requests: list[Request]) -> tuple[list[list[int]], int]:
    """What the guarded model answers to each alone, its end token included; how many refused."""
    answers, refused = [], 0
    for text, shown in requests:
        inputs = processor(images=shown or None, text=[text], return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=LENGTH, do_sample=False, return_dict_in_generate=True
        )
        answers.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        refused += any(verdict.flagged for verdict in output.verdicts)
    return answers, refused


def given(llm: Any, requests: list[Request]) -> list[list[int]]:
    """vLLM's answers to all of them at once."""
    from vllm import SamplingParams  # not everybody has it

    prompts = [
        {"prompt": text, **({"multi_modal_data": {"image": shown}} if shown else {})}
        for text, shown in requests
    ]
    params = SamplingParams(temperature=0, max_tokens=LENGTH)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


@pytest.mark.parametrize("architecture", [None, BACKEND], ids=["native", "transformers"])
def test_llava_answers_as_it_does_in_transformers(
    start: MakeEngine, llava_folder: Path, pictures: list[Image.Image], architecture: str | None
) -> None:
    processor = open_processor(llava_folder)
    requests = llava_requests(processor, pictures)
    model = load_guarded(llava_folder, dtype=torch.float32)
    answers, refused = expected(model, processor, requests)
    options = {"hf_overrides": {"architectures": [architecture]}} if architecture else {}
    llm = start(llava_folder, **options)
    assert given(llm, requests) == answers
    assert 10 < refused < 70  # both kinds are among them


def qwen_requests() -> list[Request]:
    """84 of them: about one picture, two and none."""
    shown = noise(24)
    requests: list[Request] = []
    for i in range(84):
        count = (1, 2, 1, 0)[i % 4]
        image = "<|vision_start|> <|image_pad|> <|vision_end|> "
        text = image * count + " ".join(f"w{10 + (7 * i + k) % 80}" for k in range(6))
        requests.append((text, [shown[(5 * i + k) % len(shown)] for k in range(count)]))
    return requests


def test_qwen3_vl_answers_as_it_does_in_transformers(start: MakeEngine, qwen_folder: Path) -> None:
    """Features of later layers are codewords too, and vLLM's own class takes them."""
    processor, requests = open_processor(qwen_folder), qwen_requests()
    model = load_guarded(qwen_folder, dtype=torch.float32, processor=processor)
    assert model.vqguard.config.deepstack_levels == 2
    answers, refused = expected(model, processor, requests)
    assert given(start(qwen_folder), requests) == answers
    assert 10 < refused < 70


def test_qwen2_5_vl_answers_as_it_does_in_transformers(start: MakeEngine, tmp_path: Path) -> None:
    """Pictures of several sizes in one look: vLLM's own class takes their tokens one by one."""
    folder = make_qwen(tmp_path / "qwen", "qwen2_5_vl")
    processor, requests = open_processor(folder), qwen_requests()
    model = load_guarded(folder, dtype=torch.float32, processor=processor)
    answers, refused = expected(model, processor, requests)
    assert given(start(folder), requests) == answers
    assert 10 < refused < 70
