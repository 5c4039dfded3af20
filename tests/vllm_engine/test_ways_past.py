"""Requests that would go round a guard in vLLM, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from vqguard.adapters.sizes.pictures import open_processor

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
REFUSAL = "sorry , i cannot help with that ."


@pytest.fixture
def ask(engine: Any, llava_folder: Path) -> Any:
    """(picture, sampling options, what else the prompt says) -> the completions."""
    from vllm import SamplingParams  # not everybody has it

    processor = open_processor(llava_folder)
    content = [{"type": "image"}, {"type": "text", "text": "what is in the image ?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )

    def run(picture: Any, extra: dict[str, Any] | None = None, **options: Any) -> Any:
        params = SamplingParams(**{"temperature": 0, "max_tokens": 24, **options})
        prompt = {"prompt": text, "multi_modal_data": {"image": picture}, **(extra or {})}
        return engine.generate([prompt], params, use_tqdm=False)[0].outputs

    return run


def _text(answer: Any) -> str:
    return str(answer.text).strip()  # the first token of an answer has a space before it


def test_a_flagged_picture_is_refused_and_a_clean_one_is_not(
    ask: Any, flagged: Image.Image, clean: Image.Image
) -> None:
    assert _text(ask(flagged)[0]) == REFUSAL
    assert ask(flagged)[0].finish_reason == "stop"
    assert _text(ask(clean)[0]) != REFUSAL


@pytest.mark.parametrize(
    "options",
    [
        {"n": 3, "temperature": 1.0},
        {"temperature": 2.0, "top_p": 0.5, "min_p": 0.2, "seed": 1},
        {"min_tokens": 20},
        {"ignore_eos": True},
        {"logit_bias": {5: 100.0}},
        {"allowed_token_ids": [5, 6]},
        {"bad_words": ["sorry"]},
        {"stop": ["sorry"]},
        {"stop_token_ids": list(range(4, 100))},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"logprobs": 3},
        {"prompt_logprobs": 1},
        {"skip_special_tokens": False},
        {"extra_args": {"vqguard": []}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_no_sampling_option_changes_a_refusal(
    ask: Any, flagged: Image.Image, options: dict[str, Any]
) -> None:
    for answer in ask(flagged, **options):
        assert _text(answer).startswith(REFUSAL)
        assert len(_text(answer)) < len(REFUSAL) + 8  # an end token, where those are shown


@pytest.mark.parametrize(
    "constraint",
    [
        {"json": {"type": "object", "properties": {"a": {"type": "string"}}}},
        {"regex": "[ab]+"},
        {"choice": ["red", "blue"]},
    ],
    ids=lambda constraint: next(iter(constraint)),
)
def test_structured_output_about_a_flagged_picture_is_a_refusal(
    ask: Any, flagged: Image.Image, constraint: dict[str, Any]
) -> None:
    from vllm.sampling_params import StructuredOutputsParams  # not everybody has it

    answer = ask(flagged, structured_outputs=StructuredOutputsParams(**constraint))[0]
    assert _text(answer) == REFUSAL


def test_structured_output_about_a_clean_picture_is_as_ever(ask: Any, clean: Image.Image) -> None:
    from vllm.sampling_params import StructuredOutputsParams  # not everybody has it

    choice = StructuredOutputsParams(choice=["red", "blue"])
    answer = ask(clean, structured_outputs=choice)[0]
    assert _text(answer) in ("red", "blue")


def test_a_flagged_picture_among_others_refuses_and_neighbours_go_on(
    engine: Any, ask: Any, flagged: Image.Image, clean: Image.Image
) -> None:
    alone = ask(clean)[0].token_ids
    assert _text(ask(flagged)[0]) == REFUSAL
    assert ask(clean)[0].token_ids == alone
    assert _text(ask(flagged)[0]) == REFUSAL  # from the cache


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"mm_processor_kwargs": {"do_normalize": False}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"crop_size": {"height": 48, "width": 48}}}, "processor_kwargs"),
    ],
)
def test_what_changes_the_picture_is_refused(
    ask: Any, clean: Image.Image, extra: dict[str, Any], named: str
) -> None:
    with pytest.raises(Exception, match=named):
        ask(clean, extra)


@pytest.mark.parametrize("name", ["image_embeds", "video", "audio"])
def test_other_kinds_of_input_are_refused(engine: Any, name: str) -> None:
    data = {
        "image_embeds": {"image": torch.zeros(1, 36, 192)},
        "video": {"video": torch.zeros(2, 96, 96, 3).numpy()},
        "audio": {"audio": (torch.zeros(100).numpy(), 16_000)},
    }[name]
    with pytest.raises(Exception, match=r"mm-embeds|video|[Aa]udio"):
        engine.generate([{"prompt": "<image> what", "multi_modal_data": data}])


def test_prompt_embeddings_are_refused(engine: Any) -> None:
    with pytest.raises(Exception, match=r"prompt.embeds"):
        engine.generate([{"prompt_embeds": torch.zeros(8, 192)}])


def test_a_name_in_a_file_is_no_key_of_the_cache(
    ask: Any, flagged: Image.Image, clean: Image.Image
) -> None:
    """EXIF's ImageID as a UUID is what vLLM takes for the picture's identity."""
    import uuid

    name = uuid.uuid4()

    def named(picture: Image.Image) -> Image.Image:
        copy = picture.copy()
        copy.getexif()[ExifTags.Base.ImageID] = name
        return copy

    assert _text(ask(named(clean))[0]) != REFUSAL
    assert _text(ask(named(flagged))[0]) == REFUSAL


def test_a_name_in_a_request_is_no_key_of_the_cache(
    engine: Any, ask: Any, flagged: Image.Image, clean: Image.Image
) -> None:
    named = {"multi_modal_uuids": {"image": ["known"]}}
    answer = ask(clean)[0].token_ids
    assert ask(clean, named)[0].token_ids == answer
    assert _text(ask(flagged, named)[0]) == REFUSAL
    assert ask(clean, named)[0].token_ids == answer
    with pytest.raises(Exception, match=r"uuid|UUID|not provided|data"):
        ask([None], named)


def test_beam_search_is_refused(engine: Any, flagged: Image.Image) -> None:
    from vllm.sampling_params import BeamSearchParams  # not everybody has it

    prompt = {"prompt": "<image> what", "multi_modal_data": {"image": flagged}}
    with pytest.raises(Exception, match="beam search"):
        engine.beam_search([prompt], BeamSearchParams(beam_width=2, max_tokens=4))


def test_pixels_that_are_no_numbers_are_refused(ask: Any) -> None:
    with pytest.raises(Exception, match="finite"):
        ask(np.full((96, 96, 3), np.nan))


def test_the_worker_has_no_tower_and_takes_no_pixels(engine: Any) -> None:
    from vqguard.errors import BypassError

    def model(worker: Any) -> Any:
        return worker.get_model()

    (held,) = engine.collective_rpc(model)
    assert not [name for name, _ in held.named_parameters() if "vision" in name]
    with pytest.raises(BypassError, match="as codes"):
        held.embed_multimodal(pixel_values=torch.zeros(1, 3, 96, 96))


def test_a_request_that_nobody_admitted_refuses(
    engine: Any, ask: Any, clean: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.input_processor import InputProcessor

    unguarded = InputProcessor.process_inputs.__wrapped__
    monkeypatch.setattr(InputProcessor, "process_inputs", unguarded)
    assert _text(ask(clean)[0]).startswith(REFUSAL)


def test_features_that_a_client_made_are_not_admitted(
    engine: Any, flagged: Image.Image, clean: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the endpoints of a disaggregated set-up take them: marks of a clean picture, own codes."""
    from vllm.v1.engine.input_processor import InputProcessor

    from vqguard.adapters.vllm_engine.prepared import CODES

    unguarded = InputProcessor.process_inputs.__wrapped__
    forged: list[Any] = []

    def forge(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = unguarded(self, *args, **kwargs)
        request.mm_features[0].data[CODES].data += 1
        forged.append(request)
        return request

    from vqguard.adapters.vllm_engine import admission
    from vqguard.adapters.vllm_engine.processing import judge_for

    monkeypatch.setattr(InputProcessor, "process_inputs", forge)
    picture = clean.rotate(90)  # not in any cache
    engine.generate([{"prompt": "<image> what", "multi_modal_data": {"image": picture}}])
    judge = judge_for(engine.llm_engine.model_config)
    with pytest.raises(Exception, match="did not come through the guard"):
        admission.admit(judge, forged[0])
