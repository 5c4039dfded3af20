"""What a model's processor made of a request's pictures, before the guard and after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vqguard.adapters.runtime.refusing_generate import require_no_raise
from vqguard.adapters.seams import names_pixels
from vqguard.adapters.vllm_engine.judging import PictureJudge, Seen

CODES, VERDICT, MADE = "vqguard_codes", "vqguard_verdict", "vqguard_made"
"""Of each picture: its codes, what is to be done about it, and by whom that was found."""


@dataclass
class Prepared:
    """Pictures that belong to one request."""

    data: Any
    """What vLLM expects of a processor: a mapping, with pixels."""
    count: int
    """How many pictures they are; 0 where there are no pixels."""
    seen: list[Seen] | None
    """The pictures after the guard; None: nobody has looked yet."""

    @property
    def inputs(self) -> dict[str, Any]:
        """What the model takes."""
        return {name: value for name, value in self.data.items() if not name.startswith("num_")}

    @property
    def values(self) -> int:
        """Numbers in its pixels, where these are tensors."""
        held = [value for name, value in self.data.items() if holds_pixels(name)]
        return sum(value.numel() for value in held if isinstance(value, Tensor))

    @property
    def ragged(self) -> bool:
        """Whether its pictures are held apart, because they are of different sizes."""
        return any(names_pixels(n) and isinstance(v, list) for n, v in self.inputs.items())

    def shown(self, judge: PictureJudge) -> Any:
        """Its data with codes in place of pixels.

        Raises:
            FlaggedImageError: for a picture whose policy is to raise.
        """
        if not self.count or self.seen is None:
            return self.data
        judged = [picture.verdict for picture in self.seen if picture.verdict is not None]
        require_no_raise(judged)
        data = copy(self.data)
        for name in [name for name in data if holds_pixels(name)]:
            del data[name]
        data[CODES] = [picture.codes for picture in self.seen]
        data[VERDICT] = torch.tensor([[picture.action] for picture in self.seen])
        if judged:
            data[MADE] = torch.stack([judge.tag(picture.codes) for picture in self.seen])
        return data


def joined(several: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The inputs of several requests as those of one; None where they do not fit together."""
    first = several[0]
    if any(inputs.keys() != first.keys() for inputs in several):
        return None
    for name, value in first.items():
        values = [inputs[name] for inputs in several]
        if not all(isinstance(other, Tensor) and other.dim() for other in values):
            return None
        if any(v.shape[1:] != value.shape[1:] or v.dtype != value.dtype for v in values):
            return None
    return {name: torch.cat([inputs[name] for inputs in several]) for name in first}


def holds_pixels(name: str) -> bool:
    """Whether a field has pixels in it, and does not count them."""
    return names_pixels(name) and not name.startswith("num_")


_CONTENTS: ContextVar[dict[int, tuple[Any, str]] | None] = ContextVar(
    "vqguard_contents", default=None
)


@contextmanager
def one_reading() -> Iterator[None]:
    """Inside, in this thread, a picture that was read by `contents_of` is not read again."""
    token = _CONTENTS.set({})
    try:
        yield
    finally:
        _CONTENTS.reset(token)


def contents_of(items: Any) -> list[str]:
    """For each of vLLM's items SHA-256 of its pixels and of what says how to read them."""
    return [] if items is None else [_content(items.get(i)) for i in range(items.get_count())]


def _content(picture: Any) -> str:
    known = _CONTENTS.get()
    if known is not None and id(picture) in known:
        return known[id(picture)][1]
    if isinstance(picture, Image.Image):
        palette = picture.getpalette() if picture.mode == "P" else None
        transparent = picture.info.get("transparency")
        form: Any = (picture.mode, picture.size, palette, transparent)
        pixels = picture.tobytes()
    else:
        values = np.ascontiguousarray(np.asarray(picture))
        form, pixels = (values.dtype.str, values.shape), values.tobytes()
    content = hashlib.sha256(repr(form).encode() + b"\0" + pixels).hexdigest()
    if known is not None:
        known[id(picture)] = picture, content  # the picture is kept, so that its id stays its own
    return content
