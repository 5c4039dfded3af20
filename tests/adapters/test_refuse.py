"""A flagged row refuses, its neighbours answer, and nothing runs when all refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import (
    GenerateBeamDecoderOnlyOutput,
    GenerateDecoderOnlyOutput,
)

from vqguard.errors import ConfigError, InputError
from vqguard.guard import recording

Make = Callable[..., Any]
REFUSAL = [50, 51, 52, 53, 54]
EOS, PAD = 2, 1
ALL = (0, 1, 2, 3, 4, 5)


takes_features = (
    "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[Any] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.got.append(value.tolist())

    def end(self) -> None:
        self.ended = True


def codes_of(model: Any, inputs: Any) -> list[int]:
    return [v.semantic_code for v in model.screen(pixel_values=inputs["pixel_values"])]


def with_one_flagged(model: Any, make_inputs: Make, flag_codes: Any) -> tuple[Any, int]:
    """A batch of three rows in which exactly the returned row is flagged."""
    for seed in range(50):
        inputs = make_inputs((1, 1, 1), seed)
        codes = codes_of(model, inputs)
        for row, code in enumerate(codes):
            if codes.count(code) == 1:
                flag_codes(model, {code})
                return inputs, row
    raise AssertionError("the images of no seed fall into different cells")


STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_p": 0.9, "temperature": 2.0, "top_k": 5},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 2, "do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    # Without a cache images are merged at every step: a generated placeholder would not fit.
    "no cache": {"use_cache": False, "do_sample": False, "suppress_tokens": [60]},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "min_new_tokens": 9},
    "chunked": {"prefill_chunk_size": 7, "do_sample": False},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_flagged_row_refuses_and_neighbours_answer(
    make_guarded: Make, make_inputs: Make, flag_codes: Any, strategy: str, site: str
) -> None:
    model = make_guarded(site=site)
    inputs, row = with_one_flagged(model, make_inputs, flag_codes)
    settings = STRATEGIES[strategy]
    if strategy == "chunked" and not takes_features:
        pytest.skip("this transformers cannot chunk a prompt with images")
    torch.manual_seed(0)
    output = model.generate(**inputs, **settings, max_new_tokens=10)
    expand = settings.get("num_return_sequences", 1)
    prompts = inputs["input_ids"].repeat_interleave(expand, 0)
    assert torch.equal(output[:, : prompts.shape[1]], prompts)
    answers = output[:, prompts.shape[1] :].tolist()
    refusal = (REFUSAL + [EOS] + [PAD] * 10)[: len(answers[0])]
    for index, answer in enumerate(answers):
        assert (answer == refusal) == (index // expand == row)
    assert [verdict.flagged for verdict in model.last_verdicts] == [i == row for i in range(3)]


@pytest.mark.parametrize("strategy", [{"do_sample": False}, {"num_beams": 3}])
def test_neighbours_answer_as_without_the_flagged_row(
    make_guarded: Make, make_inputs: Make, flag_codes: Any, strategy: Any
) -> None:
    model = make_guarded()
    inputs, row = with_one_flagged(model, make_inputs, flag_codes)
    together = model.generate(**inputs, **strategy, max_new_tokens=8)
    keep = [index for index in range(3) if index != row]
    without = {name: value[keep] for name, value in inputs.items()}
    apart = model.generate(**without, **strategy, max_new_tokens=8)
    width = min(together.shape[1], apart.shape[1])
    assert torch.equal(together[keep][:, :width], apart[:, :width])
    assert (together[keep][:, width:] == PAD).all()


def test_language_model_sees_codeword_zero_for_a_flagged_row(
    make_guarded: Make, make_inputs: Make, flag_codes: Any
) -> None:
    model = make_guarded()
    inputs, row = with_one_flagged(model, make_inputs, flag_codes)
    caught: list[Any] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=2)
    places = inputs["input_ids"] == 60
    zero = model.vqguard.patch.codebook.weight[0]
    assert (caught[0][row][places[row]] == zero).all()
    other = (row + 1) % 3
    assert not (caught[0][other][places[other]] == zero).all()


def test_images_map_to_their_rows(make_guarded: Make, make_inputs: Make, flag_codes: Any) -> None:
    model = make_guarded()
    images = (2, 0, 1, 3)
    owners = [0, 0, 2, 3, 3, 3]
    for seed in range(4):
        inputs = make_inputs(images, seed)
        codes = codes_of(model, inputs)
        for code in set(codes):
            flag_codes(model, {code})
            expected = {owner for owner, found in zip(owners, codes, strict=True) if found == code}
            answers = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:].tolist()
            assert {i for i, answer in enumerate(answers) if answer == REFUSAL[:3]} == expected


def test_nothing_runs_when_every_row_is_flagged(
    make_guarded: Make, make_inputs: Make, count_calls: Make
) -> None:
    model, inputs = make_guarded(flag=ALL), make_inputs((1, 2))
    runs = count_calls(model.model.language_model)
    tower = count_calls(model.model.vision_tower)
    output = model.generate(**inputs, max_new_tokens=9)
    assert output[:, -6:].tolist() == [[*REFUSAL, EOS]] * 2
    assert torch.equal(output[:, :-6], inputs["input_ids"])
    assert model.screen(pixel_values=inputs["pixel_values"]) == model.last_verdicts
    assert not runs
    assert len(tower) == 2
    model(**inputs)
    assert len(runs) == 1


def test_encoder_runs_once_for_a_mixed_batch(
    make_guarded: Make, make_inputs: Make, flag_codes: Any, count_calls: Make
) -> None:
    model = make_guarded()
    inputs, _ = with_one_flagged(model, make_inputs, flag_codes)
    tower = count_calls(model.model.vision_tower)
    model.generate(**inputs, max_new_tokens=5)
    assert len(tower) == 1


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("flag", [(), ALL])
def test_dictionary_outputs(
    make_guarded: Make, make_inputs: Make, flag: tuple[int, ...], beams: int
) -> None:
    model, inputs = make_guarded(flag=flag), make_inputs((1, 1))
    output: Any = model.generate(
        **inputs,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=9,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    kind = GenerateBeamDecoderOnlyOutput if beams > 1 else GenerateDecoderOnlyOutput
    assert type(output).__name__ == kind.__name__
    assert len(output.sequences) == 2 * beams
    assert {tuple(score.shape) for score in output.scores} == {(2 * beams, 64)}
    if flag:
        assert len(output.scores) == len(REFUSAL) + 1
        chosen = torch.stack([score.argmax(-1) for score in output.scores], 1)
        assert torch.equal(chosen, output.sequences[:, -6:])
        assert output.logits is None
        assert output.past_key_values is None
    plain = model.generate(**inputs, return_dict_in_generate=True, max_new_tokens=2)
    assert plain.scores is None


def test_streamers_receive_prompt_refusal_and_end(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(flag=ALL), make_inputs()
    streamer = Recorder()
    model.generate(**inputs, streamer=streamer, max_new_tokens=9)
    assert streamer.got[0] == inputs["input_ids"].tolist()
    assert [token for part in streamer.got[1:] for token in part] == [*REFUSAL, EOS]
    assert streamer.ended


def test_streamer_in_a_mixed_batch(make_guarded: Make, make_inputs: Make, flag_codes: Any) -> None:
    model = make_guarded()
    inputs, row = with_one_flagged(model, make_inputs, flag_codes)
    streamer = Recorder()
    output = model.generate(**inputs, streamer=streamer, max_new_tokens=8, do_sample=False)
    assert [part[row] for part in streamer.got[1:]] == output[row, -8:].tolist()
    assert streamer.ended


@pytest.mark.parametrize("length", [1, 3, 6])
def test_long_refusals_are_cut(
    make_guarded: Make, make_inputs: Make, flag_codes: Any, length: int
) -> None:
    model, inputs = make_guarded(flag=ALL), make_inputs()
    expected = [*REFUSAL, EOS][:length]
    width = inputs["input_ids"].shape[1]
    config: Any = GenerationConfig
    for settings in (
        {"max_new_tokens": length},
        {"max_length": width + length},
        {"generation_config": config(max_new_tokens=length, eos_token_id=EOS)},
    ):
        assert model.generate(**inputs, **settings)[0, width:].tolist() == expected
    inputs, row = with_one_flagged(model, make_inputs, flag_codes)
    width = inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=length, min_new_tokens=length)
    assert answers[row, width:].tolist() == expected


def test_without_refusal_ids_the_answer_is_the_end_token(
    make_guarded: Make, make_inputs: Make
) -> None:
    model, inputs = make_guarded(flag=ALL, refusal_ids=None), make_inputs()
    assert model.generate(**inputs, max_new_tokens=5)[0].tolist() == [
        *inputs["input_ids"][0].tolist(),
        EOS,
    ]
    model.generation_config.eos_token_id = None
    with pytest.raises(ConfigError, match="nothing to answer"):
        model.generate(**inputs)


def test_refusal_text_is_tokenised(make_llava: Make, make_inputs: Make) -> None:
    from vqguard.adapters import build_guard, guard_model
    from vqguard.safety_map import SafetyMap

    class Tokenizer:
        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [20 + len(word) for word in text.split()]}

    class Processor:
        tokenizer = Tokenizer()

    model = make_llava()
    guard = build_guard(model, patch_codes=4, semantic_codes=1, refusal_text="no thank you")
    guard.safety_map = SafetyMap(
        ("gun",), torch.tensor([[1, 0]]), codebook_checksum=guard.checksum("semantic")
    )
    guard_model(model, guard, Processor())
    assert model.generate(**make_inputs())[0, -4:].tolist() == [22, 25, 23, EOS]


def test_without_a_map_images_are_an_error_but_forward_works(
    make_guarded: Make, make_inputs: Make
) -> None:
    model, inputs = make_guarded(), make_inputs()
    model.vqguard.safety_map = None
    with pytest.raises(ConfigError, match="calibrate"):
        model.generate(**inputs)
    with pytest.raises(ConfigError, match="calibrate"):
        model.screen(pixel_values=inputs["pixel_values"])
    assert model(**inputs).logits.isfinite().all()
    assert model.generate(**make_inputs((0,)), max_new_tokens=2).shape[0] == 1


def test_forward_answers_on_codewords_and_the_verdict_is_recorded(
    make_guarded: Make, make_inputs: Make
) -> None:
    model, inputs = make_guarded(flag=ALL), make_inputs((2,))
    with recording(model.vqguard) as seen:
        assert model(**inputs).logits.isfinite().all()
    assert seen[0].flagged is not None
    assert seen[0].flagged.tolist() == [True, True]


@pytest.mark.parametrize("spoil", ["too few", "too many", "straddling"])
def test_prompts_that_do_not_hold_their_images(
    make_guarded: Make, make_inputs: Make, spoil: str
) -> None:
    model, inputs = make_guarded(), make_inputs((1, 1))
    ids = inputs["input_ids"]
    places = (ids == 60).nonzero().tolist()
    if spoil in ("too few", "straddling"):
        ids[tuple(places[0])] = 7
    if spoil == "straddling":
        ids[1, -1] = 60
    if spoil == "too many":
        ids[1, -1] = 60
    with pytest.raises(InputError, match="placeholders"):
        model.generate(**inputs)
    with pytest.raises(InputError, match="beside the pixels"):
        model.generate(pixel_values=inputs["pixel_values"])
