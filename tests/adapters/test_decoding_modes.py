"""However `generate` decodes, a flagged picture is refused and its neighbour answers.

What transformers takes from the hub, or refuses by itself, is not answered at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
)

from vqguard.adapters import get_adapter
from vqguard.adapters.proof.guarded_subject import REFUSAL, flag, guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.proof.random_models.sizes import VOCABULARY
from vqguard.adapters.random_inputs.prompts import EOS, PAD

NEW_TOKENS = 5
SAID = (*REFUSAL, EOS, PAD)
"""What a refused row says in five tokens."""
KINDS = ("llava", "qwen2_vl", "mllama", "blip-2", "idefics3", "florence2", "git")

Settings = dict[str, Any]


def sampling(**settings: Any) -> Settings:
    return {"do_sample": True, **settings}


MODES: dict[str, Settings] = {
    "greedy": {},
    "sampling": sampling(),
    "hot sampling": sampling(temperature=5.0),
    "cold sampling": sampling(temperature=0.05),
    "top k": sampling(top_k=3),
    "top k of one": sampling(top_k=1),
    "top p": sampling(top_p=0.5),
    "min p": sampling(min_p=0.05),
    "top h": sampling(top_h=0.4),
    "typical p": sampling(typical_p=0.5),
    "epsilon cutoff": sampling(epsilon_cutoff=3e-4),
    "eta cutoff": sampling(eta_cutoff=3e-4),
    "renormalised": sampling(renormalize_logits=True, top_p=0.9),
    "samples of each": sampling(num_return_sequences=3),
    "samples of each in a dictionary": sampling(
        num_return_sequences=2, return_dict_in_generate=True, output_scores=True
    ),
    "beams": {"num_beams": 3},
    "beams, stopped early": {"num_beams": 2, "early_stopping": True},
    "beams, never stopped early": {"num_beams": 2, "early_stopping": "never"},
    "long beams": {"num_beams": 2, "length_penalty": 5.0},
    "short beams": {"num_beams": 2, "length_penalty": -5.0},
    "all beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": sampling(num_beams=3, top_k=5),
    "all sampled beams": sampling(num_beams=2, num_return_sequences=2),
    "beams in a dictionary": {
        "num_beams": 2,
        "return_dict_in_generate": True,
        "output_scores": True,
    },
    "one token": {"max_new_tokens": 1, "min_new_tokens": 0},
    "two tokens": {"max_new_tokens": 2, "min_new_tokens": 0},
    "no minimum": {"min_new_tokens": 0},
    "a minimum length": {"min_new_tokens": None, "min_length": 10},
    "no time": {"max_time": 0.0, "min_new_tokens": 0},
    "repetition penalty": {"repetition_penalty": 4.0},
    "encoder repetition penalty": {"encoder_repetition_penalty": 4.0},
    "no repeated words": {"no_repeat_ngram_size": 1},
    "no words of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "bad words are the refusal's": {"bad_words_ids": [[token] for token in REFUSAL]},
    "the refusal is suppressed": {"suppress_tokens": list(REFUSAL)},
    "its beginning is suppressed": {"begin_suppress_tokens": [REFUSAL[0]]},
    "a bias away from the refusal": {"sequence_bias": {(REFUSAL[0],): -50.0}},
    "a bias to another word": {"sequence_bias": {(11,): 50.0}},
    "a bias to the refusal": {"sequence_bias": {(REFUSAL[0],): 50.0}},
    "a forced end": {"forced_eos_token_id": EOS},
    "another end": {"forced_eos_token_id": 12, "min_new_tokens": 0},
    "decaying length": {"exponential_decay_length_penalty": (1, 1.5), "min_new_tokens": 0},
    "infinities removed": {"remove_invalid_values": True},
    "guidance": {"guidance_scale": 3.0},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=9.0)},
    "a dictionary": {"return_dict_in_generate": True},
    "scores": {"return_dict_in_generate": True, "output_scores": True},
    "logits": {"return_dict_in_generate": True, "output_logits": True},
    "hidden states": {"return_dict_in_generate": True, "output_hidden_states": True},
    "attentions": {"return_dict_in_generate": True, "output_attentions": True},
    "everything, in beams": {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
        "output_hidden_states": True,
        "num_beams": 2,
    },
    "no cache": {"use_cache": False},
    "no cache, in beams": {"use_cache": False, "num_beams": 2},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
    "static cache, in beams": {"cache_implementation": "static", "num_beams": 2},
    "static cache, samples of each": sampling(
        cache_implementation="static", num_return_sequences=2
    ),
    "a configuration": {"generation_config": GenerationConfig(max_new_tokens=NEW_TOKENS)},
    "a configuration of beams": {
        "generation_config": GenerationConfig(num_beams=2, num_return_sequences=2),
        "num_return_sequences": None,
        "expand": 2,
    },
    "without compiling": {"cache_implementation": "static", "disable_compile": True},
    "prefill by chunks": {"prefill_chunk_size": 64},
}
"""Settings of one call; `expand`: answers a row where the call's own arguments do not say."""


class Bias:
    """A logits processor and stopping criterion of the operator's."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.token] += 30
        return scores


class AfterTwo:
    """Stops after two calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids: Tensor, scores: Any, **rest: Any) -> Tensor:
        self.calls += 1
        return torch.full((len(ids),), self.calls >= 2)


class Kept:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class OneWordATime:
    """The least of a tokenizer that stop strings ask for."""

    def __call__(self, words: list[str], **settings: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word.strip("<>"))] for word in words if word[0] == "<"]}

    def get_vocab(self) -> dict[str, int]:
        return {f"<{index}>": index for index in range(VOCABULARY)}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def assistant(model: Any) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=model.config.get_text_config().vocab_size,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def static(model: Any) -> Any:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=256)


MADE: dict[str, Callable[[Any], Settings]] = {
    "a logits processor": lambda m: {"logits_processor": LogitsProcessorList([Bias(13)])},
    "a plain list of processors": lambda m: {"logits_processor": [Bias(13)]},
    "a processor in beams": lambda m: {
        "logits_processor": LogitsProcessorList([Bias(13)]),
        "num_beams": 2,
    },
    "allowed tokens": lambda m: {"prefix_allowed_tokens_fn": lambda batch, ids: [11, 12, 13]},
    "allowed tokens in beams": lambda m: {
        "prefix_allowed_tokens_fn": lambda batch, ids: [11, 12, 13],
        "num_beams": 2,
    },
    "stopping": lambda m: {
        "stopping_criteria": StoppingCriteriaList([AfterTwo()]),
        "min_new_tokens": 0,
    },
    "stop strings": lambda m: {
        "stop_strings": ["<7>", "<11>"],
        "tokenizer": OneWordATime(),
        "min_new_tokens": 0,
    },
    "an own empty cache": lambda m: {
        "past_key_values": DynamicCache(config=m.config.get_text_config())
    },
    "an own static cache": lambda m: {"past_key_values": static(m)},
    "several ends": lambda m: {"eos_token_id": [EOS, 11, 12], "min_new_tokens": 0},
    "a negative prompt": lambda m: {
        "guidance_scale": 3.0,
        "negative_prompt_ids": torch.tensor([[0, 5], [0, 6]]),
    },
}

ALONE: dict[str, Callable[[Any], Settings]] = {
    "a streamer": lambda m: {"streamer": Kept()},
    "a streamer of samples": lambda m: sampling(streamer=Kept()),
    "prompt lookup": lambda m: {"prompt_lookup_num_tokens": 2},
    "sampled prompt lookup": lambda m: sampling(prompt_lookup_num_tokens=2),
    "prompt lookup in a dictionary": lambda m: {
        "prompt_lookup_num_tokens": 2,
        "return_dict_in_generate": True,
    },
    "an assistant": lambda m: {"assistant_model": assistant(m)},
    "a sampling assistant": lambda m: sampling(assistant_model=assistant(m)),
    "an early exit": lambda m: {"assistant_early_exit": 1},
}
"""Those that take one row."""

HUB: dict[str, Settings] = {
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "group beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "constrained beams": {"num_beams": 2, "force_words_ids": [[11]]},
    "layer contrast": {"dola_layers": "low"},
}
"""Loops that transformers would fetch from the hub, as code."""

CASES = [
    pytest.param(kind, mode, marks=() if kind == "llava" else pytest.mark.slow, id=f"{kind}-{mode}")
    for kind in KINDS
    for mode in [*MODES, *MADE]
]
CASES_ALONE = [
    pytest.param(kind, mode, marks=() if kind == "llava" else pytest.mark.slow, id=f"{kind}-{mode}")
    for kind in KINDS
    for mode in ALONE
]


@contextmanager
def subject(kind: str) -> Iterator[tuple[Any, dict[str, Any], int]]:
    """(guarded model, inputs of two rows, the code of the second row's picture)."""
    model = build_tiny(kind)
    if kind == "llava":
        model.set_attn_implementation("eager")  # attentions are asked for
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"):
        first, second = model.screen(**inputs)
        assert first.semantic_code != second.semantic_code
        yield model, inputs, second.semantic_code


def run(model: Any, inputs: dict[str, Any], settings: Settings) -> tuple[Any, list[list[int]]]:
    """What `generate` returned, and the new tokens of every sequence."""
    torch.manual_seed(5)
    usual = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    call = {**usual, **settings}
    call.pop("expand", None)
    output = model.generate(**inputs, **{k: v for k, v in call.items() if v is not None})
    sequences = output if isinstance(output, Tensor) else output.sequences
    prompt = get_adapter(model).answer_prompt(model, inputs)
    return output, sequences[:, 0 if prompt is None else prompt.shape[1] :].tolist()


def unsupported(kind: str, inputs: dict[str, Any], settings: Settings, error: Exception) -> str:
    """Why the bare model cannot decode so, if it cannot."""
    try:
        run(build_tiny(kind), inputs, settings)
    except type(error) as same:
        return f"transformers cannot, guarded or not: {str(same)[:80]}"
    return ""


@pytest.mark.parametrize(("kind", "mode"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_flagged_row_is_refused_and_its_neighbour_answers(kind: str, mode: str) -> None:
    with subject(kind) as (model, inputs, code):

        def settings() -> Settings:
            return MADE[mode](model) if mode in MADE else MODES[mode]

        said = settings()
        expand = int(said.get("expand") or said.get("num_return_sequences") or 1)
        try:
            _, usual = run(model, inputs, settings())
        except Exception as error:
            reason = unsupported(kind, inputs, settings(), error)
            if not reason:
                raise
            pytest.skip(reason)
        flag(model, {code})
        output, answers = run(model, inputs, settings())
        verdicts = model.last_verdicts
    assert [verdict.flagged for verdict in verdicts] == [False, True]
    if not isinstance(output, Tensor):
        assert output.verdicts == verdicts
    assert len(answers) == 2 * expand
    width = len(answers[0])
    assert width >= 1
    for answer in answers[expand:]:
        assert answer == [*SAID, *[PAD] * NEW_TOKENS][:width]
    for answer, before in zip(answers[:expand], usual[:expand], strict=True):
        longest = min(len(answer), len(before))
        assert answer[:longest] == before[:longest]
        assert answer[: len(REFUSAL)] != list(REFUSAL)[:width] or mode == "a bias to the refusal"


@pytest.mark.parametrize(("kind", "mode"), CASES_ALONE)
@pytest.mark.filterwarnings("ignore")
def test_one_row_at_a_time(kind: str, mode: str) -> None:
    with subject(kind) as (model, _, _):
        alone = [make_inputs(model, (1,), seed) for seed in (0, 1)]
        codes = [model.screen(**inputs)[0].semantic_code for inputs in alone]
        if codes[0] == codes[1]:
            pytest.skip("two random pictures fell into one cell")
        try:
            _, usual = run(model, alone[0], ALONE[mode](model))
        except Exception as error:
            reason = unsupported(kind, alone[0], ALONE[mode](model), error)
            if not reason:
                raise
            pytest.skip(reason)
        flag(model, {codes[1]})
        settings = ALONE[mode](model)
        _, answers = run(model, alone[0], settings)
        assert answers == usual
        assert not model.last_verdicts[0].flagged
        settings = ALONE[mode](model)
        _, answers = run(model, alone[1], settings)
        assert answers[0] == list(SAID)[: len(answers[0])]
        assert model.last_verdicts[0].flagged
        streamer = settings.get("streamer")
        if streamer is not None:
            assert streamer.ended
            assert streamer.tokens[-len(answers[0]) :] == answers[0]


@pytest.mark.parametrize("mode", HUB)
@pytest.mark.filterwarnings("ignore")
def test_loops_of_the_hub_answer_nobody(mode: str) -> None:
    with subject("llava") as (model, inputs, code):
        flag(model, {code})
        with pytest.raises((ValueError, OSError)):
            run(model, inputs, HUB[mode])
        assert model.last_verdicts == []
