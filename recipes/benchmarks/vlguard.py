"""Refusals beside pictures, in VLGuard's JSON: training data for stage 2.

An entry is `{id, image, safe, instr-resp: [pair, …]}`. A pair is `{instruction, response}`, or
beside a safe picture `{safe_instruction, response}` and `{unsafe_instruction, response}`. As
VLGuard's own conversion does (github.com/ys-zong/VLGuard, `convert_to_llava_format.py`; arXiv
2402.02207), the pairs of an entry are the turns of one conversation; here each order of two takes
its turn, epoch by epoch, in place of a random one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vqguard.errors import DataError
from vqguard.recipes.data.image_roots import image_root
from vqguard.recipes.data.llava_json import LlavaEntries, sample_of
from vqguard.recipes.data.media.named import Looking, Media
from vqguard.recipes.data.records.checked import Checks
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.records.unread import count_unread
from vqguard.recipes.data.samples import IMAGE_MARK, Sample

PAIRS = "instr-resp"
_INSTRUCTIONS = ("instruction", "safe_instruction", "unsafe_instruction")
_KEYS = ("id", "image", "safe", PAIRS, "harmful_category", "harmful_subcategory")
_PREFIX = "refusal "  # ids are those of another file's samples, as often as not


def read_refusals(
    data: Path,
    images: Path | None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    checks: Checks | None = None,
    follow_links: bool = False,
) -> LlavaData:
    """Check a file in VLGuard's form.

    Args:
        data: the JSON file.
        images: folder, zip or tar that the image paths start from; None: the file's folder.
        seed: order in which samples are used.
        skip_bad: leave bad entries out and list them, instead of refusing the file.
        checks: what samples must pass besides, and what is known of them.
        follow_links: as of `image_roots.FolderRoot`.

    Raises:
        DataError: a file or an entry that does not fit, with its place.
    """
    checks = checks or Checks()
    root = image_root(images if images is not None else data.parent, follow_links=follow_links)
    key = checks.key(data, "refusals", images, seed, skip_bad)
    read = LlavaData.collect(
        data,
        LlavaEntries(data, Media(root), "", refusal_of),
        seed=seed,
        skip_bad=skip_bad,
        check=checks.check,
        known=checks.known.get(key),
    )
    if not read.samples:
        raise DataError(f"{data}: has no usable entry, so there is nothing to refuse.")
    if read.checked is not None:
        checks.known[key] = read.checked
    return read


def refusal_of(
    entry: Any,
    media: Media,
    where: str,
    name: str,
    *,
    look: Looking | None,
    unread: Counter[str] | None = None,
) -> Sample:
    """One entry of VLGuard's JSON, checked; arguments and errors as of `llava_json.sample_of`."""
    if not isinstance(entry, dict) or not isinstance(entry.get(PAIRS), list) or not entry[PAIRS]:
        raise DataError(
            f"{where}: expected VLGuard's {{id, image, safe, {PAIRS}: [{{instruction, response}}]}}"
            "; a file in LLaVA's form goes into `data`."
        )
    if not isinstance(entry.get("image"), str):
        raise DataError(f"{where}: expected 'image', the path of a picture.")
    if not isinstance(entry.get("safe"), bool):
        raise DataError(f"{where}: expected 'safe', true or false; got {entry.get('safe')!r}.")
    pairs = [_pair(pair, f"{where}: pair {number}") for number, pair in enumerate(entry[PAIRS])]
    if unread is not None:
        count_unread(unread, entry, _KEYS)
    first, *others = [
        sample_of(
            {"image": entry["image"], "conversations": _turns(ordered)},
            media,
            where,
            str(entry.get("id", name)),
            look=look,
        )
        for ordered in ([pairs, pairs[::-1]] if len(pairs) == 2 else [pairs])
    ]
    rewordings = tuple(other.turns for other in others)
    return replace(first, id=f"{_PREFIX}{first.id}", rewordings=rewordings)


def _pair(pair: Any, where: str) -> tuple[str, str]:
    """(instruction, response)."""
    told = pair if isinstance(pair, dict) else {}
    asked = [told[key] for key in _INSTRUCTIONS if key in told]
    said = told.get("response")
    texts = [*asked, said]
    if len(asked) != 1 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise DataError(
            f"{where}: expected one of {', '.join(_INSTRUCTIONS)} and a response, all texts; got "
            f"{str(pair)[:80]!r}."
        )
    return asked[0], str(said)


def _turns(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for number, (asked, said) in enumerate(pairs):
        mark = "" if number else f"{IMAGE_MARK}\n"
        turns += [{"from": "human", "value": mark + asked}, {"from": "gpt", "value": said}]
    return turns
