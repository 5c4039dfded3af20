"""Conversations under a model's own chat template, and where the answers are in the text.

An answer is found by rendering the conversation up to it and once more with it: what the longer
text adds is the assistant's turn. A template that does not only append, but rewrites what it wrote
before, has no such answers; there the template's own `{% generation %}` marks are used, if it has
them (transformers' `return_assistant_tokens_mask`), and otherwise the sample is refused.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers.utils import chat_template_utils

from vqguard.errors import DataError, InputError, first_line
from vqguard.recipes.data.records.forms import Form, Shape, Span, texts_of
from vqguard.recipes.data.records.turns import is_text
from vqguard.recipes.data.samples import IMAGE_MARK, VIDEO_MARK, Sample

FALLBACKS = {
    # Prompt, answer, end of text, as LAVIS trains it (lavis/models/blip2_models/
    # blip2_vicuna_instruct.py, `concat_text_input_output`). The picture is put in front later.
    "InstructBlipProcessor": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ ' ' }}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
        "{% endfor %}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
"""Templates for processors that are published without one, by class name."""

_SYSTEM, _NOBODY = "system", "nobody"
"""A role that templates know, and one that they do not."""
_UNKNOWN = "\ue000"
"""A character for private use: no vocabulary has it."""
_WORD = "stand-in"
"""Stands for a text; no template writes it by itself."""
_SHORTEST = 3
"""Characters of the shortest special token that is kept out of a question."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatTemplate:
    """A processor's chat template.

    Raises:
        InputError: for a processor without one.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.kind = type(processor).__name__
        template = getattr(processor, "chat_template", None) or FALLBACKS.get(self.kind)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise InputError(
                f"{self.kind} has no chat template, so the turns cannot be written down as this "
                "model expects them. Set processor.chat_template."
            )
        self.template = str(template)
        tokenizer = processor.tokenizer
        added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.special = tuple(sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True))
        bos = tokenizer.bos_token
        # A template that writes the first token itself, and a tokenizer that does so too: only one.
        doubled = bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        self._leading = str(bos) if doubled else ""
        own = (getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio"))
        marks = {*self.special, *(str(token) for token in own if token), IMAGE_MARK}
        # a pad token may be a plain character, as CLIP's "!" is
        spelled = sorted((mark for mark in marks if len(mark) >= _SHORTEST), key=len, reverse=True)
        self._tokens = dict(tokenizer.special_tokens_map)
        self._forms: dict[Shape, Form | None] = {}
        self._marks = re.compile("|".join(map(re.escape, spelled)))
        self._firsts = {mark[0] for mark in spelled}
        # what unknown characters become stands for any text, and for marks without a token
        unknown = tokenizer(_UNKNOWN, add_special_tokens=False)["input_ids"]
        ids = {tokenizer.convert_tokens_to_ids(mark) for mark in spelled}
        self._special_ids = ids - {None, tokenizer.unk_token_id, *unknown}

    def render(self, messages: Sequence[dict[str, Any]], *, ask: bool = False) -> str:
        """The text of these messages; with `ask` the assistant's turn is begun."""
        text: str = self.processor.apply_chat_template(
            list(messages),
            chat_template=self.template,
            add_generation_prompt=ask,
            tokenize=False,
        )
        return text.removeprefix(self._leading)

    def conversation(self, sample: Sample) -> tuple[str, list[Span]]:
        """A sample's text, and the character span of each answer with its end-of-turn token.

        A template without an end of turn gets the end-of-text token behind its last answer:
        without one, the model would not learn to stop. What spells a special token is text
        (`as_text`).

        Raises:
            DataError: the template rewrites earlier turns, or does not write an answer as it is.
        """
        marks = marks_of(sample)
        said = [(self.as_text(q, keep=marks), self.as_text(a)) for q, a in sample.turns]
        messages = _messages(said, marks)
        shape = tuple(tuple(p["type"] for p in message["content"]) for message in messages)
        if shape not in self._forms:
            self._forms[shape] = self._form(shape)
        form = self._forms[shape]
        filled = form.filled(messages) if form is not None else None
        # One rendering says whether the template treats these texts as it does any.
        if form and filled and self._directly(messages) + form.end == filled[0]:
            return filled
        return self._located(messages, [answer.strip() for _, answer in said], sample.id)

    def _located(
        self, messages: Sequence[dict[str, Any]], answers: Sequence[str], name: str
    ) -> tuple[str, list[Span]]:
        """The text of a conversation and its answers' spans, found by the text's beginnings."""
        text = self.render(messages)
        turns = self._appended(messages, text) or self._generated(messages)
        if len(turns) != len(answers):
            raise DataError(
                f"sample {name}: the chat template of {self._name()} rewrites earlier turns, "
                "so the answers cannot be located. Use single-turn conversations with this model, "
                "or a template with {% generation %} marks."
            )
        spans: list[Span] = []
        closed = True
        for turn, answer in zip(turns, answers, strict=True):
            span, closed = self._answer(text, turn, answer, name)
            spans.append(span)
        end = self.processor.tokenizer.eos_token
        if not closed and end:
            start, stop = spans[-1]
            text = text[:stop] + end
            spans[-1] = (start, len(text))
        return text, spans

    def _form(self, shape: Shape) -> Form | None:
        """How the template writes a conversation of this shape, from one of stand-ins.

        None where that cannot be told.
        """
        numbers = itertools.count(1)
        messages: list[dict[str, Any]] = [
            {
                "role": ("user", "assistant")[place % 2],
                "content": [
                    {"type": "text", "text": f"standin{next(numbers)}z"}
                    if kind == "text"
                    else {"type": kind}
                    for kind in parts
                ],
            }
            for place, parts in enumerate(shape)
        ]
        texts, answers = texts_of(messages), texts_of(messages[1::2])
        try:
            text, spans = self._located(messages, answers, "")
            direct = self._directly(messages)
        except (AttributeError, DataError, TemplateError):
            return None
        literals = []
        rest = text
        for stand_in in texts:
            before, found, rest = rest.partition(stand_in)
            if not found:
                return None
            literals.append(before)
        if not text.startswith(direct):
            return None
        margins = []
        for answer, (start, stop) in zip(answers, spans, strict=True):
            place = text.index(answer)
            margins.append((place - start, stop - place - len(answer)))
        return Form(tuple(literals), rest, text.removeprefix(direct), tuple(margins))

    def _directly(self, messages: Sequence[dict[str, Any]]) -> str:
        """What `render` gives, past all that processors do around a template."""
        text: str = self._compiled().render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=False,
            **self._tokens,
        )
        return text.removeprefix(self._leading)

    def _compiled(self) -> Any:
        """The template as transformers compiles it, which keeps it."""
        compile_template: Any = chat_template_utils._compile_jinja_template  # it has no public name
        return compile_template(self.template)

    def prompt(self, question: str, *, picture: bool = False, video: bool = False) -> str:
        """A single question, ready to be answered; a picture or a video stands in front of it.

        What spells a special token in the question is text (`as_text`).

        Raises:
            InputError: the question holds half a character, as bytes do that are not UTF-8.
        """
        if not is_text(question):
            raise InputError("the question is not UTF-8; write it in UTF-8")
        shown = [{"type": "image"}] * picture + [{"type": "video"}] * video
        content = [*shown, *contents(self.as_text(question))]
        return self.render([{"role": "user", "content": content}], ask=True)

    def asked(self, messages: Sequence[dict[str, Any]]) -> str:
        """Messages that users wrote, ready to be answered.

        `messages`: `{"role": "system" | "user" | "assistant", "content": [parts]}`, parts as in
        `contents`; system messages come first. What spells a special token is text (`as_text`),
        whoever is said to have written it. A template without a place for system messages gets
        them in front of the first question, as in training.

        Raises:
            InputError: half a character; a conversation that the template refuses; a system message
                behind others; texts that make up a special token only when they stand together.
        """
        plain = [
            {**message, "content": [self._as_text(part) for part in message["content"]]}
            for message in messages
        ]
        plain = self._with_system(plain)
        text = self._rendered(plain)
        stand_ins = [
            {**m, "content": [{**p, "text": _WORD} if "text" in p else p for p in m["content"]]}
            for m in plain
        ]
        if self._specials(text) != self._specials(self._rendered(stand_ins)):
            raise InputError(
                "the messages' texts spell a special token of the model together: leave it out"
            )
        return text

    def as_text(self, said: str, *, keep: Sequence[str] = ()) -> str:
        """What somebody said, with a blank in each special token: tokenizers read it as text then.

        Processors tokenize a whole conversation at once, so no part of it can be marked as text.

        Args:
            said: the text.
            keep: marks that are left as they are.
        """
        for mark in keep:
            if mark in said:
                return mark.join(self.as_text(piece, keep=keep) for piece in said.split(mark))
        if not any(first in said for first in self._firsts):  # far quicker than the pattern
            return said
        while self._marks.search(said):
            said = self._marks.sub(lambda mark: f"{mark[0][0]} {mark[0][1:]}", said)
        return said

    def _as_text(self, part: dict[str, str]) -> dict[str, str]:
        if "text" not in part:
            return part
        if not is_text(part["text"]):
            raise InputError("a message is not UTF-8; write it in UTF-8")
        return {**part, "text": self.as_text(part["text"])}

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with system messages where the template has a place for them."""
        count = sum(message["role"] == _SYSTEM for message in messages)
        if not count:
            return messages
        if any(message["role"] != _SYSTEM for message in messages[:count]):
            raise InputError("system messages come before all others; move them to the front")
        said = [part for message in messages[:count] for part in message["content"]]
        rest = messages[count:]
        if self._has_system():
            return [{"role": _SYSTEM, "content": said}, *rest]
        if not rest or rest[0]["role"] != "user":
            raise InputError("expected a question of the user after the system message")
        return [{"role": "user", "content": [*said, *rest[0]["content"]]}, *rest[1:]]

    def _has_system(self) -> bool:
        """Whether the template knows system messages: it writes another role's otherwise."""
        content = [{"type": "text", "text": _WORD}]
        shown = {}
        for role in (_SYSTEM, _NOBODY):
            try:
                shown[role] = self.render(
                    [{"role": role, "content": content}, {"role": "user", "content": content}],
                    ask=True,
                )
            except TemplateError:
                shown[role] = ""
        return shown[_SYSTEM].count(_WORD) == 2 and shown[_SYSTEM] != shown[_NOBODY]

    def _rendered(self, messages: Sequence[dict[str, Any]]) -> str:
        try:
            return self.render(messages, ask=True)
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses this conversation: {first_line(error)}"
            ) from error

    def _specials(self, text: str) -> list[int]:
        """The special tokens of a text, in order."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [token for token in ids if token in self._special_ids]

    def _appended(self, messages: Sequence[dict[str, Any]], whole: str) -> list[Span]:
        """The assistant's turns by their beginnings; none if the template does not only append."""
        turns: list[Span] = []
        before = ""
        for number in range(1, len(messages), 2):
            asked = self.render(messages[:number], ask=True)
            last = number + 1 == len(messages)
            told = whole if last else self.render(messages[: number + 1])
            if not (asked.startswith(before) and told.startswith(asked) and whole.startswith(told)):
                return []
            turns.append((len(asked), len(told)))
            before = told
        return turns

    def _generated(self, messages: Sequence[dict[str, Any]]) -> list[Span]:
        """The assistant's turns by the template's own marks; none if it has no marks."""
        if not _GENERATION.search(self.template):
            return []
        special = self.processor.tokenizer.special_tokens_map
        render: Any = chat_template_utils.render_jinja_template
        texts, marks = render(
            conversations=[list(messages)],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **special,
        )
        gone = len(texts[0]) - len(texts[0].removeprefix(self._leading))
        return [(start - gone, end - gone) for start, end in marks[0]]

    def _answer(self, text: str, turn: Span, answer: str, name: str) -> tuple[Span, bool]:
        """The answer in the assistant's turn, its end included, and whether it has one."""
        start, stop = turn
        begin = text.find(answer, start, stop)
        if begin < 0:
            raise DataError(
                f"sample {name}: the chat template of {self._name()} does not write the answer "
                f"{answer[:40]!r} as it is, so it cannot be located."
            )
        if text[start:begin].strip():  # something of the template's own stands before the answer
            start = begin
        end = begin + len(answer)
        tail = text[end:stop]
        if not tail.strip():
            return (start, end), False
        skipped = len(tail) - len(tail.lstrip())
        for token in self.special:
            if tail.startswith(token, skipped):
                return (start, end + skipped + len(token)), True
        return (start, end + len(tail.rstrip())), True  # an end that is written in words

    def _name(self) -> str:
        path = getattr(self.processor.tokenizer, "name_or_path", "")
        return f"{self.kind} ({path})" if path else self.kind


def messages_of(sample: Sample) -> list[dict[str, Any]]:
    """A sample in the form that chat templates take."""
    return _messages(sample.turns, marks_of(sample))


def marks_of(sample: Sample) -> tuple[str, ...]:
    """What stands for something that is shown in its questions."""
    return (IMAGE_MARK, VIDEO_MARK) if sample.videos else (IMAGE_MARK,)


def _messages(
    turns: Sequence[tuple[str, str]], marks: Sequence[str] = (IMAGE_MARK,)
) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        messages.append({"role": "user", "content": contents(question, marks)})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def contents(question: str, marks: Sequence[str] = (IMAGE_MARK,)) -> list[dict[str, str]]:
    """What a question shows and says, in order, without the line breaks beside a picture."""
    kinds = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
    parts: list[dict[str, str]] = []
    for piece in re.split(f"({'|'.join(map(re.escape, marks))})", question.strip()):
        text = piece.strip("\n")
        if text in marks:
            parts.append({"type": kinds[text]})
        elif text.strip():
            parts.append({"type": "text", "text": text})
    return parts


def prompt_text(
    processor: Any, question: str, *, picture: bool = False, video: bool = False
) -> str:
    """A single question under the chat template, ready to be answered."""
    return ChatTemplate(processor).prompt(question, picture=picture, video=video)
