"""What a model's processor made of a request's pictures, before the guard and after it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
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


def parted(data: Any, fields: Mapping[str, Any], counts: Sequence[int]) -> list[Prepared]:
    """What a processor made of the pictures of several requests at once, for each request.

    Args:
        data: of all of them.
        fields: vLLM's, which say what in `data` is whose; what has none has a row a picture.
        counts: how many pictures each request has.

    Raises:
        ValueError: something in `data` is not of as many pictures, so that nobody knows whose it
            is.
    """
    total = sum(counts)
    whose = {name: fields[name].build_elems(name, data[name]) for name in data if name in fields}
    for name in data:
        if len(whose.get(name, data[name])) != total:
            raise ValueError(f"expected {total} pictures in {name}")
    parts = []
    for count, end in zip(counts, accumulate(counts), strict=True):
        own = copy(data)
        for name in data:
            if name in whose:
                own[name] = fields[name].field.reduce_data(whose[name][end - count : end])
            else:
                own[name] = data[name][end - count : end]
        parts.append(Prepared(own, count, None))
    return parts


def fit(inputs: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether the inputs of two requests can be joined: rows of the same tensors."""
    if inputs.keys() != others.keys():
        return False
    for name, value in inputs.items():
        other = others[name]
        if not (isinstance(value, Tensor) and isinstance(other, Tensor) and value.dim()):
            return False
        if value.dtype != other.dtype or value.shape[1:] != other.shape[1:] or not other.dim():
            return False
    return True


def joined(several: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The inputs of several requests, which fit, as those of one."""
    return {name: torch.cat([inputs[name] for inputs in several]) for name in several[0]}


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
