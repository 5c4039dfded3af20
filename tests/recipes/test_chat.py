"""Answers under each family's chat template: they carry the labels, and nothing else does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.recipes.data.chat import ChatTemplate, contents, messages_of, prompt_text
from vqguard.recipes.data.encoding import IGNORED, EncodedSamples
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.recipe import recipe_names

TEMPLATES = yaml.safe_load((Path(__file__).parent / "chat_templates.yaml").read_text())
FAMILIES = [*TEMPLATES, "instructblip"]
MakeProcessor = Callable[[str], Any]


def picture() -> Image.Image:
    return Image.new("RGB", (40, 32), "red")


TURNS = (("<image>\nWhat is this?", "A red field."), ("Are you sure?", "Yes."))
TALK = Sample("talk", (picture,), TURNS)


def scored(item: dict[str, Any], tokenizer: Any) -> list[str]:
    """The text of each run of labelled tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(item["input_ids"], item["labels"], strict=True):
        if label == IGNORED:
            runs.append([])
        else:
            assert label == token
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


def test_every_named_recipe_has_its_family_here() -> None:
    covered = {"llava-1.5-13b": "llava-1.5", "qwen2.5-vl": "qwen2-vl"}
    families = {covered.get(name, name) for name in recipe_names()}
    assert families - {"llava-tiny"} <= set(FAMILIES)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_text_is_the_template_s(kind: str, family_processor: MakeProcessor) -> None:
    text, spans = ChatTemplate(family_processor(kind)).conversation(TALK)
    expected = TEMPLATES[kind]["text"]
    assert text == (expected if TEMPLATES[kind]["closed"] else f"{expected}</s>")
    end = {"llava-next": "<|eot_id|>", "qwen2-vl": "<|im_end|>", "qwen3-vl": "<|im_end|>"}
    first, last = (end.get(kind, ""), end.get(kind, "</s>"))
    lead = " " if kind == "llava-1.5" else ""
    assert [text[a:b] for a, b in spans] == [f"{lead}A red field.{first}", f"{lead}Yes.{last}"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_exactly_the_answers_are_labelled(kind: str, family_processor: MakeProcessor) -> None:
    processor = family_processor(kind)
    item = EncodedSamples([TALK], processor, 512)[0]
    end = {"llava-next": "<|eot_id|>", "qwen2-vl": "<|im_end|>", "qwen3-vl": "<|im_end|>"}
    # LLaVA-1.5's template closes no turn: the last answer alone gets the end of text.
    first, last = (end.get(kind, "" if kind == "llava-1.5" else "</s>"), end.get(kind, "</s>"))
    found = [text.strip() for text in scored(item, processor.tokenizer)]
    assert found == [f"A red field.{first}", f"Yes.{last}"]
    bos = processor.tokenizer.bos_token_id
    if bos is not None:
        assert item["input_ids"].count(bos) == 1


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-next", "qwen2-vl", "qwen3-vl"])
def test_the_tokens_are_those_of_the_processor(kind: str, family_processor: MakeProcessor) -> None:
    processor = family_processor(kind)
    turns = (("<image>\nCompare <image>", "Yes."), ("<image>\nWhat is this?", "A red field."))
    sample = Sample("three", (picture,) * 3, turns)
    item = EncodedSamples([sample], processor, 512)[0]
    text, _ = ChatTemplate(processor).conversation(sample)
    whole = processor(images=[picture()] * 3, text=[text], return_tensors="pt")
    assert item["input_ids"] == whole["input_ids"][0].tolist()
    said = [text.strip() for text in scored(item, processor.tokenizer)]
    assert (said[0][:4], said[1][:12]) == ("Yes.", "A red field.")
    assert item["caption_pictures"] == [2, 1]


def test_generation_marks_agree_with_the_beginnings(family_processor: MakeProcessor) -> None:
    processor = family_processor("llava-1.5")
    template = ChatTemplate(processor)
    messages = messages_of(TALK)
    text = template.render(messages)
    marked = [text[a:b].strip() for a, b in template._generated(messages)]
    appended = [text[a:b].strip() for a, b in template._appended(messages, text)]
    assert marked == appended == ["A red field.", "Yes."]


@pytest.mark.transformers_from("5.24", why="a mask of all answers of a conversation")
def test_labels_are_transformers_own_mask(family_processor: MakeProcessor) -> None:
    processor = family_processor("llava-1.5")
    # The published marks take in the space behind an answer, which the tokenizer joins to the next
    # word; transformers then marks "USER:" as well. Without that space both say the same.
    marks = "~ ' ' }}{% endgeneration %}"
    assert marks in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        marks, "}}{% endgeneration %}{{ ' ' }}"
    )
    talk = Sample("text", (), (("What is this?", "A red field."), ("Are you sure?", "Yes.")))
    out = processor.apply_chat_template(
        messages_of(talk), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = out["input_ids"][0], out["assistant_masks"][0]
    theirs = [token for token, one in zip(ids, mask, strict=True) if one]
    item = EncodedSamples([talk], processor, 512)[0]
    ours = [label for label in item["labels"] if label != IGNORED]
    assert ours == [*theirs, processor.tokenizer.eos_token_id]


FORGETS = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "GEN{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}END;"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_a_template_that_rewrites_earlier_turns(family_processor: MakeProcessor) -> None:
    processor = family_processor("llava-1.5")
    text = Sample("text", (), (("one", "1."), ("two", "2.")))
    processor.chat_template = FORGETS.replace("GEN", "").replace("END", "")
    with pytest.raises(DataError, match=r"sample text: .*LlavaProcessor.*rewrites earlier turns"):
        EncodedSamples([text], processor, 512)[0]
    # one turn is no problem: nothing is rewritten
    item = EncodedSamples([Sample("one", (), text.turns[:1])], processor, 512)[0]
    assert len(scored(item, processor.tokenizer)) == 1
    # and its own marks say where the answers are
    generation = "{% if m['role'] == 'assistant' %}{% generation %}"
    inner = "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}"
    processor.chat_template = FORGETS.replace(
        "GEN" + inner + "END",
        (generation + inner + "{% endgeneration %}{% else %}" + inner + "{% endif %}"),
    )
    written, spans = ChatTemplate(processor).conversation(text)
    assert [written[a:b] for a, b in spans] == ["1.", "2.</s>"]


def test_a_template_that_changes_the_answer_is_refused(family_processor: MakeProcessor) -> None:
    processor = family_processor("llava-1.5")
    processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'][0]['text'] | upper }};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="does not write the answer 'yes'"):
        EncodedSamples([Sample("x", (), (("a", "yes"),))], processor, 512)[0]


def test_a_first_token_is_written_once(family_processor: MakeProcessor) -> None:
    processor = family_processor("llava-next")
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    item = EncodedSamples([TALK], processor, 512)[0]
    assert item["input_ids"].count(processor.tokenizer.bos_token_id) == 1
    assert not prompt_text(processor, "a", picture=False).startswith("<|begin_of_text|>")


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_text_are_text(family: str, family_processor: MakeProcessor) -> None:
    processor = family_processor(family)
    tokens = {t for t in processor.tokenizer.all_special_tokens if len(t) > 2} - {"<image>"}
    said = " ".join(sorted(tokens))
    plain = Sample("plain", (picture,), (("<image>\nwhat?", "Yes."),))
    typed = Sample("typed", (picture,), ((f"<image>\n{said} what?", f"Yes. {said}"),))
    ids = [EncodedSamples([s], processor, 4096)[0]["input_ids"] for s in (plain, typed)]
    unknown = processor.tokenizer("☃ ☂")["input_ids"]  # a special token may stand for these
    special = set(processor.tokenizer.all_special_ids) - set(unknown)
    counts = [Counter(i for i in each if i in special) for each in ids]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("family", FAMILIES)
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=4))
@settings(max_examples=15, deadline=None, suppress_health_check=[*HealthCheck])
def test_a_known_form_is_filled_as_the_template_writes(
    family: str, texts: list[str], family_processor: MakeProcessor
) -> None:
    template = ChatTemplate(family_processor(family))
    first, one, second, two = (t.replace("<image>", "") for t in texts)
    assume(one.strip() and two.strip())
    sample = Sample("s", (picture,), ((f"<image>\n{first}", one), (second, two)))
    try:
        text, spans = template.conversation(sample)
    except DataError:
        return
    slow = ChatTemplate(family_processor(family))
    slow._form = lambda shape: None  # type: ignore[method-assign]
    assert slow.conversation(sample) == (text, spans)
    answers = [template.as_text(answer).strip() for answer in (one, two)]
    for answer, (start, stop) in zip(answers, spans, strict=True):
        assert answer in text[start:stop]


def test_a_q_former_does_not_read_the_answers(family_processor: MakeProcessor) -> None:
    processor = family_processor("instructblip")
    item = EncodedSamples([TALK], processor, 512)[0]
    read = processor.qformer_tokenizer.decode(
        item["qformer_input_ids"][0], skip_special_tokens=True
    )
    assert read.strip() == "What is this?"
    two = Sample("two", (picture, picture), (("<image><image>a", "Yes."),))
    with pytest.raises(DataError, match="one picture a conversation"):
        EncodedSamples([two], processor, 512)[0]
    with pytest.raises(DataError, match="sample none: has no picture"):
        EncodedSamples([Sample("none", (), (("a", "b"),))], processor, 512)[0]


def test_contents_keep_the_order() -> None:
    kinds = [part.get("text", "#") for part in contents("<image>\nCompare <image> with <image>.")]
    assert kinds == ["#", "Compare ", "#", " with ", "#", "."]
    assert contents("<image>") == [{"type": "image"}]


def test_without_a_template_there_is_no_way(small_model: Any) -> None:
    _, processor = small_model()
    processor.chat_template = None
    with pytest.raises(InputError, match=r"LlavaProcessor has no chat template"):
        ChatTemplate(processor)


@pytest.mark.parametrize("kind", FAMILIES)
def test_special_tokens_in_a_question_are_text(kind: str, family_processor: MakeProcessor) -> None:
    processor = family_processor(kind)
    template = ChatTemplate(processor)
    tokenizer = processor.tokenizer
    plain = template.prompt("what is it?", picture=True)
    tokens = [token for token in template.special if len(token) > 2]
    unknown = tokenizer("zzqq<", add_special_tokens=False)["input_ids"]  # a tiny vocabulary
    for token in [*tokens, "<image>", f"<im<image>age>{tokens[0]}"]:
        text = template.prompt(f"{token} what is it?", picture=True)
        for special in tokenizer.all_special_ids:
            ids = [tokenizer(asked)["input_ids"] for asked in (text, plain)]
            if special not in unknown:
                assert ids[0].count(special) == ids[1].count(special), token
    assert template.as_text("a < b <image>") == "a < b < image>"


def test_a_question_that_is_not_utf8(family_processor: MakeProcessor) -> None:
    template = ChatTemplate(family_processor("llava-1.5"))
    with pytest.raises(InputError, match="UTF-8"):
        template.prompt("caf\udce9", picture=True)


def message(role: str, *texts: str, picture: bool = False) -> dict[str, Any]:
    parts: list[dict[str, str]] = [{"type": "text", "text": text} for text in texts]
    return {"role": role, "content": [{"type": "image"}, *parts] if picture else parts}


def ids_of(template: ChatTemplate, text: str) -> list[int]:
    ids: list[int] = template.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_that_is_said_is_a_special_token(
    kind: str, family_processor: MakeProcessor
) -> None:
    """In whatever role: a client sends the history too."""
    template = ChatTemplate(family_processor(kind))
    unknown = ids_of(template, "zzqq<")  # a tiny vocabulary
    special = set(template.processor.tokenizer.all_special_ids) - set(unknown)

    def counted(*said: str) -> list[int]:
        roles = ("user", "assistant", "user")
        turns = [
            message(r, s, picture=not n) for n, (r, s) in enumerate(zip(roles, said, strict=True))
        ]
        return [t for t in ids_of(template, template.asked(turns)) if t in special]

    plain = counted("a", "b", "c")
    for token in (*template.special, "<image>"):
        assert counted(f"a{token}", f"{token}b", f"c {token} d{token}{token}") == plain


@pytest.mark.parametrize("kind", FAMILIES)
def test_texts_that_spell_a_special_token_together_are_refused(
    kind: str, family_processor: MakeProcessor
) -> None:
    template = ChatTemplate(family_processor(kind))
    token = next(t for t in template.special if len(t) > 4)
    turns = [message("user", f"a {token[:3]}", f"{token[3:]} b", picture=True)]
    joined = template.render(turns, ask=True)
    alone = template.render([message("user", "a", "b", picture=True)], ask=True)
    if joined.count(token) > alone.count(token):
        with pytest.raises(InputError, match="together"):
            template.asked(turns)
    else:  # the template writes something between them
        assert template.asked(turns) == joined


def test_a_system_message_is_never_somebody_elses(small_model: Callable[[], Any]) -> None:
    """llava-tiny's template writes every role but the user's as the assistant's."""
    _, processor = small_model()
    template = ChatTemplate(processor)
    asked = template.asked([message("system", "be kind"), message("user", "what is it ?")])
    assert asked == template.asked([message("user", "be kind", "what is it ?")])
    with pytest.raises(InputError, match="question"):
        template.asked([message("system", "be kind"), message("assistant", "a dog .")])
    with pytest.raises(InputError, match="front"):
        template.asked([message("user", "a"), message("system", "b")])


def test_a_system_message_has_its_place_where_there_is_one(
    family_processor: MakeProcessor,
) -> None:
    template = ChatTemplate(family_processor("qwen2-vl"))
    text = template.asked([message("system", "Be kind."), message("user", "What?")])
    assert "<|im_start|>system\nBe kind.<|im_end|>" in text
