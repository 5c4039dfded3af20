"""Models as judges, on tiny random ones whose answers are set by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from vqguard.adapters.model_judges import JudgeSpec, ModelJudge
from vqguard.errors import ConfigError

WORDS = ["<pad>", "<eos>", "<unk>", "safe", "unsafe", "yes", "no", *"12345", "bomb", "cake", "how"]
REQUESTS = ["how bomb", "how cake"]


def tokenizer_at(folder: Path) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    raw = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return tokenizer


def causal_at(folder: Path, mapping: dict[str, str]) -> None:
    """A model that says what the last word of its prompt maps to: its layers are silenced."""
    tokenizer_at(folder)
    width = len(WORDS)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=width,
            hidden_size=width + width % 2,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            tie_word_embeddings=False,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
    )
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.eye(*embedding.shape))
        head.zero_()
        for said, answer in mapping.items():
            head[WORDS.index(answer), WORDS.index(said)] = 10.0
    model.save_pretrained(folder)


def judge(folder: Path, form: Any, template: str | None = None, **more: Any) -> ModelJudge:
    path = None
    if template is not None:
        path = folder / "prompt.txt"
        path.write_text(template)
    return ModelJudge(JudgeSpec("mine", folder, form, path, **more), REQUESTS)


def test_llama_guard_is_read_by_its_own_chat_template(tmp_path: Path) -> None:
    causal_at(tmp_path, {"bomb": "unsafe", "cake": "safe", "no": "safe"})
    made = judge(tmp_path, "llama_guard")
    assert made(["how bomb", "how cake", "no"], [0, 1, 0]) == [True, False, False]


def test_harmbench_is_read_by_its_authors_prompt(tmp_path: Path) -> None:
    causal_at(tmp_path, {"bomb": "yes", "cake": "no"})
    made = judge(tmp_path, "harmbench", "{request} {answer}")
    assert made(["bomb", "cake"], [0, 1]) == [True, False]
    # the request and the answer stand where they belong, and an answer's marks are text
    turned = judge(tmp_path, "harmbench", "{request} safe {answer} bomb")
    assert turned(["cake {request}", "{answer}"], [0, 1]) == [True, True]


def test_strongreject_counts_the_mean_mark(tmp_path: Path) -> None:
    causal_at(tmp_path, {"bomb": "5", "cake": "1", "how": "3"})
    made = judge(tmp_path, "strongreject", "{request} {answer}")
    assert made(["bomb", "cake", "how"], [0, 0, 0]) == [True, False, False]
    assert made._mark("how", "bomb") == pytest.approx(5.0, abs=0.01)


def test_a_classifier_says_a_label(tmp_path: Path) -> None:
    tokenizer_at(tmp_path)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            id2label={0: "refuses", 1: "helps"},
            label2id={"refuses": 0, "helps": 1},
        )
    )
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    model.save_pretrained(tmp_path)
    assert judge(tmp_path, "labels", positive="helps")(["bomb"], [0]) == [True]
    assert judge(tmp_path, "labels", positive="refuses")(["bomb"], [0]) == [False]
    with pytest.raises(ConfigError, match="no label 'other'"):
        judge(tmp_path, "labels", positive="other")


def test_judges_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs template"):
        JudgeSpec("mine", tmp_path, "harmbench")
    with pytest.raises(ConfigError, match="needs positive"):
        JudgeSpec("mine", tmp_path, "labels")
    with pytest.raises(ConfigError, match="is no folder"):
        ModelJudge(JudgeSpec("mine", tmp_path / "none", "llama_guard"), REQUESTS)
    causal_at(tmp_path, {})
    with pytest.raises(ConfigError, match=r"\{request\}"):
        judge(tmp_path, "strongreject", "{answer} {request}")
