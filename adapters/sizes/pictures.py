"""Processors from a folder: sizes to which they would blow up a picture, and files of any size.

`preprocessor_config.json` may ask for pictures of a million pixels a side, or for a thousand tiles
of each. The classes that read it are transformers', so their own defaults tell what a number means:
a longest edge of twelve million counts pixels.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from vqguard.adapters.sizes.configured import numbers_in
from vqguard.bounded import read_bytes
from vqguard.errors import ArtefactError
from vqguard.images import MAX_PIXELS
from vqguard.text_files import MAX_DOCUMENT, read_json

MAX_SIDE = 4096
"""Pixels of a side to which pictures are made larger or smaller."""
MAX_ENLARGED = 2**20
"""Pixels to which small pictures are made larger, where a class counts pixels and not sides."""
MAX_NUMBER = 2**20
"""Of any other whole number; ids of tokens have 300 000."""
MAX_TOKENS = 2**18
"""Image tokens of one picture."""
MAX_BESIDE = 64 * 2**20
"""Bytes of a file beside the weights. The largest `tokenizer.json` has 33 MB."""
TIMES = 4
"""However large a class's own default is, so many times it is accepted."""

_AREA = 2**17
"""A default beyond this is no side of a picture."""
_SIDES = ("height", "width", "shortest_edge", "longest_edge", "max_height", "max_width")
_TILES = ("max_patches", "max_crops", "max_image_tiles", "max_num_tiles", "max_tiles")
_SLICES = ("max_slice_nums", "pan_and_scan_max_num_crops")
_BESIDE = (
    *("*config.json", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("tokenizer*.json", "vocab*", "merges*", "*.model", "*.tiktoken", "*.jinja"),
)
_PARTS = ("image", "video")
_LARGE = ("tokenizer.json", "vocab")
"""How the names of JSON files begin that readers in other languages bound."""


def open_processor(location: str | Path, kind: Any = AutoProcessor) -> Any:
    """The processor in a folder or behind a hub id; `kind`: its class, or an Auto class.

    Raises:
        ArtefactError: a file of its folder is too large or is no JSON, or it would make pictures
            or prompts of sizes that no model has.
    """
    folder = Path(location)
    if folder.is_dir():
        require_small_files(folder)
    processor = kind.from_pretrained(location, trust_remote_code=False)
    require_pictures(processor, location)
    return processor


def require_small_files(folder: Path) -> None:
    """Check the files that transformers reads whole: regular, of `MAX_BESIDE`, JSON as ours is.

    Raises `ArtefactError`.
    """
    for path in sorted({path for pattern in _BESIDE for path in folder.glob(pattern)}):
        if path.is_dir():
            continue
        if path.suffix == ".json" and not path.name.startswith(_LARGE):
            read_json(path, ArtefactError, MAX_DOCUMENT, strict=False)
        else:
            read_bytes(path, MAX_BESIDE, ArtefactError)


def require_pictures(processor: Any, origin: str | Path) -> None:
    """Check what a processor, or its parts for images and videos, would make of a picture.

    Raises:
        ArtefactError: a number is beyond its limit, or pixels or tokens are, all together.
    """
    parts = [processor, *(getattr(processor, f"{name}_processor", None) for name in _PARTS)]
    for part in parts:
        if part is not None:
            _require_part(part, origin)
    image = getattr(processor, "image_processor", None)
    patch = getattr(processor, "patch_size", None)
    if image is not None and isinstance(patch, int) and not isinstance(patch, bool):
        tokens = _pixels(image, _set(image)) // max(1, patch) ** 2
        if tokens > MAX_TOKENS:
            raise ArtefactError(
                f"{origin}: its processor would make {tokens:,} tokens of a picture, at most "
                f"{MAX_TOKENS:,} are accepted; restore its files"
            )


def _require_part(part: Any, origin: str | Path) -> None:
    here = _set(part)
    for name, value in here.items():
        for path, number in numbers_in(value, name):
            most = _limit(part, path)
            if isinstance(number, int) and abs(number) > most:
                raise ArtefactError(
                    f"{origin}: {type(part).__name__} has {path} {number:,}, at most {most:,} is "
                    "accepted; restore its files"
                )
    own = _pixels(part, {name: _default(part, name) for name in here})
    pixels, most = _pixels(part, here), max(MAX_PIXELS, TIMES * own)
    if pixels > most:
        raise ArtefactError(
            f"{origin}: {type(part).__name__} would make {pixels:,} pixels of a picture, at most "
            f"{most:,} are accepted; restore its files"
        )


def _set(part: Any) -> dict[str, Any]:
    """What a part was configured with; its tokenizer and the parts inside of it are not its own."""
    own: dict[str, Any] = {}
    for name, value in vars(part).items():
        if isinstance(value, (int, list, tuple, Mapping)):
            own[name] = value
        elif is_dataclass(value):  # transformers' SizeDict
            own[name] = asdict(value)  # type: ignore[arg-type]
    return own


def _default(part: Any, name: str) -> Any:
    """What a class has where its files say nothing."""
    value = getattr(type(part), name, None)
    if value is None:
        given = inspect.signature(type(part).__init__).parameters.get(name)
        value = None if given is None or given.default is given.empty else given.default
    return value


def _limit(part: Any, path: str) -> int:
    name, _, key = path.partition(".")
    default = _default(part, name)
    if key and isinstance(default, Mapping):
        default = default.get(key)
    known = default if isinstance(default, int) else 0
    if "min_pixels" in (name, key) or (key == "shortest_edge" and _counts_pixels(part, name)):
        most = MAX_ENLARGED
    elif path.endswith("_pixels") or _counts_pixels(part, name):
        most = MAX_PIXELS
    elif key in _SIDES or name.endswith("size"):
        most = MAX_SIDE
    else:
        most = MAX_NUMBER
    return max(most, TIMES * known)


def _counts_pixels(part: Any, name: str) -> bool:
    default = _default(part, name)
    edge = default.get("longest_edge") if isinstance(default, Mapping) else default
    return isinstance(edge, int) and edge > _AREA


def _pixels(part: Any, values: Mapping[str, Any]) -> int:
    """The most pixels that a picture becomes, all its tiles together."""
    areas = (area for name, value in values.items() for area in _areas(part, name, value))
    tiles = (values.get(name) for name in (*_TILES, *_SLICES))
    count = max((t for t in tiles if isinstance(t, int)), default=1)
    return max(areas, default=0) * max(1, count)


def _areas(part: Any, name: str, value: Any) -> Iterator[int]:
    if not name.endswith("size") or name == "patch_size":
        return
    if not isinstance(value, Mapping):
        side = value if isinstance(value, int) else 0
        yield side if _counts_pixels(part, name) else side**2
        return
    sides = {key: number for key, number in value.items() if isinstance(number, int)}
    if _counts_pixels(part, name) or any(key.endswith("_pixels") for key in sides):
        yield max(sides.values(), default=0)
    elif "height" in sides or "width" in sides:
        yield math.prod(sides.get(key, 1) for key in ("height", "width"))
    else:
        yield max(sides.values(), default=0) ** 2
