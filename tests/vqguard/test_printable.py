"""What comes from outside is shown without a character that a terminal would obey."""

from __future__ import annotations

import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqguard.names import printable

UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
HOSTILE = st.text(
    st.one_of(
        st.characters(),
        st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp"]),
        st.sampled_from("\x1b\n\r\t\x00\x7f\x9b\u202e\u2066\u2028\u200b\udcff"),
    )
)


@given(HOSTILE | st.binary().map(os.fsdecode))
def test_nothing_that_acts_is_left(text: str) -> None:
    shown = printable(text)
    assert not {unicodedata.category(c) for c in shown} & UNSAFE
    assert len(shown.splitlines()) <= 1
    shown.encode("utf-8")  # no bytes that are no text
    assert printable(shown) == shown
    assert (shown == text) == text.isprintable()


@given(HOSTILE)
def test_lines_may_stay_where_they_are_expected(text: str) -> None:
    shown = printable(text, lines=True)
    assert not {unicodedata.category(c) for c in shown if c not in "\n\t"} & UNSAFE
    assert shown.count("\n") == text.count("\n")
    assert printable(shown, lines=True) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain näme 写真 (1).png", "plain näme 写真 (1).png"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\nb.png: ok", "a\\nb.png: ok"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        (os.fsdecode(b"\xff.png"), "\\udcff.png"),
    ],
)
def test_the_escapes_are_pythons(text: str, shown: str) -> None:
    assert printable(text) == shown
