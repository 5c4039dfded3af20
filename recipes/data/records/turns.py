"""Conversations as (question, answer) pairs, however they are written down.

Turns are LLaVA's (`from`, `value`) or chat messages (`role`, `content`); a content is a text, or
a list of parts `{type: text}`, `{type: image}` and `{type: video}`. Or they are pairs (`user`,
`assistant`), as in the Cauldron, whose pictures have no marks and stand in front. As LLaVA's
trainer does (`llava/train/train.py`, `preprocess_v1`), a first turn of the assistant is skipped,
and a last question without an answer carries no label, so it is left out. A first system turn is
put in front of the first question: many chat templates have no place of their own for it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vqguard.errors import DataError
from vqguard.recipes.data.records.unread import count_unread, refuse_media
from vqguard.recipes.data.samples import IMAGE_MARK, VIDEO_MARK

_HUMAN, _GPT, _SYSTEM = "human", "gpt", "system"
_ROLES = {"user": _HUMAN, "assistant": _GPT}
_PAIR = frozenset({"user", "assistant"})
_KEYS = frozenset({"from", "role", "value", "content"})


def read_turns(
    conversations: Any,
    where: str,
    unread: Counter[str] | None = None,
    pictures: int = 0,
    videos: int = 0,
) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of a conversation.

    Args:
        conversations: a list of turns.
        where: how messages call it.
        unread: counts what is left out.
        pictures: how many the record has; they are needed where a form has no marks for them.
        videos: the same. Without one, `<video>` is text. LLaVA-NeXT's records mark a video by
            `<image>`: where there are videos alone, that stands for them.

    Raises:
        DataError: naming `where`.
    """
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: expected a non-empty list 'conversations'.")
    unread = Counter() if unread is None else unread
    if all(isinstance(turn, dict) and turn.keys() >= _PAIR for turn in conversations):
        conversations = _turns_of_pairs(conversations, pictures, unread)
    said = [
        _turn(turn, f"{where}: turn {n}", unread, videos) for n, turn in enumerate(conversations)
    ]
    system = said.pop(0)[1] if said[0][0] == _SYSTEM else ""
    first = len(conversations) - len(said)
    if said and said[0][0] == _GPT:
        unread["first turns without a question"] += 1
        said, first = said[1:], first + 1
    for place, (role, text) in enumerate(said):
        expected = (_HUMAN, _GPT)[place % 2]
        turn = f"{where}: turn {first + place}"
        if role != expected:
            raise DataError(
                f"{turn} is from {role!r}, expected {expected!r}; turns alternate between "
                f"{_HUMAN!r} and {_GPT!r}."
            )
        if role == _GPT and not text.strip():
            raise DataError(f"{turn} is an empty answer.")
    if len(said) < 2:
        raise DataError(
            f"{where}: expected human and gpt turns in pairs, expected {_HUMAN!r} first; no pair is"
            f" left of {len(conversations)} turns."
        )
    if len(said) % 2:
        unread["last questions without an answer"] += 1
        said.pop()
    texts = [text for _, text in said]
    if system.strip():
        texts[0] = f"{system.strip()}\n\n{texts[0]}"
    if videos and not pictures and not any(VIDEO_MARK in text for text in texts):
        texts = [text.replace(IMAGE_MARK, VIDEO_MARK) for text in texts]
    marks = (IMAGE_MARK, VIDEO_MARK) if videos else (IMAGE_MARK,)
    questions = [mark_first(text, marks) for text in texts[::2]]
    return tuple(zip(questions, texts[1::2], strict=True))


def _turns_of_pairs(
    pairs: list[dict[str, Any]], pictures: int, unread: Counter[str]
) -> list[dict[str, Any]]:
    turns = []
    for pair in pairs:
        count_unread(unread, pair, _PAIR)
        turns += [{"role": role, "content": pair[role]} for role in ("user", "assistant")]
    if not any(IMAGE_MARK in str(pair["user"]) for pair in pairs):
        turns[0]["content"] = "\n".join([*[IMAGE_MARK] * pictures, str(turns[0]["content"])])
    return turns


def mark_first(question: str, marks: tuple[str, ...] = (IMAGE_MARK,)) -> str:
    """The question with its picture or video in front, where it has exactly one of them.

    Several stay in place. As LLaVA trains (LLaVA-NeXT, `llava/train/train.py`,
    `preprocess_multimodal`).
    """
    there = [mark for mark in marks for _ in range(question.count(mark))]
    if len(there) != 1:
        return question.strip()
    return f"{there[0]}\n{question.replace(there[0], '').strip()}".strip()


def is_text(value: str) -> bool:
    """Whether it can be encoded: JSON can write half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _turn(turn: Any, where: str, unread: Counter[str], videos: int) -> tuple[str, str]:
    """(role, text) of a turn."""
    if not isinstance(turn, dict):
        raise DataError(f"{where} must be {{'from': …, 'value': text}}.")
    # Arrow fills the fields that a turn lacks with null
    role = turn.get("from") or turn.get("role")
    content = turn.get("content") if turn.get("value") is None else turn["value"]
    if not turn.keys() <= _KEYS:
        refuse_media(turn, _KEYS, where)
        count_unread(unread, turn, _KEYS)
    if isinstance(content, list):
        content = "".join(_part(part, where, videos) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} must be {{'from': …, 'value': text}}.")
    if not is_text(content):
        raise DataError(f"{where} holds half a character. Write it in UTF-8.")
    return _ROLES.get(str(role), str(role)), content


def _part(part: Any, where: str, videos: int) -> str:
    """A part of a typed content; Arrow fills the fields that it lacks with null."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise DataError(f"{where}: expected a text or a typed part, got {type(part).__name__}.")
    kind, text = part.get("type"), part.get("text")
    if kind == "video" and not videos:
        raise DataError(
            f"{where}: a part of type 'video' is not read: its record names no 'video' beside the "
            "turns."
        )
    marks = {"image": IMAGE_MARK, "video": VIDEO_MARK}
    if kind not in (*marks, "text", None):
        raise DataError(
            f"{where}: a part of type {kind!r} is not read; expected 'image', 'video' or 'text'."
        )
    if kind not in marks and not isinstance(text, str):
        raise DataError(f"{where}: a part of type {kind!r} has no text.")
    refuse_media(part, ("type", "text"), where)
    return marks[kind] if kind in marks else str(text)
