"""The pictures and videos that records name, looked at and opened."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vqguard.errors import DataError, InputError
from vqguard.recipes.data.image_roots import FolderRoot, ImageRoot, Size
from vqguard.recipes.data.media.ahead import LookingAhead
from vqguard.recipes.data.samples import ClipOpener, Opener
from vqguard.videos import FRAMES, Clip, ClipSize, check_clip, decode_clip

MEDIA_KEYS = ("image", "images", "video", "videos")
"""Keys of a record that name what it shows."""


@dataclass(frozen=True)
class NamedClip:
    """Opens the frames of a video of a root; equal to whatever opens the same ones."""

    root: ImageRoot
    name: str
    frames: int

    def __call__(self) -> Clip:
        with self.root.stream(self.name) as stream:
            return decode_clip(stream, self.root.where(self.name), self.frames)


@dataclass(frozen=True)
class Media:
    """Where pictures and videos are, and how many frames of a video are shown."""

    root: ImageRoot
    frames: int = FRAMES

    def picture(self, name: str) -> Opener:
        """What opens a picture."""
        return self.root.opener(name)

    def clip(self, name: str) -> ClipOpener:
        """What opens the frames of a video."""
        return NamedClip(self.root, name, self.frames)


class Looking:
    """Looks at each picture and each video once: many records may show the same.

    Args:
        media: where they are.
        decode: look at each to its last byte.
        ahead: another process may look at those that are expected.
    """

    def __init__(self, media: Media, *, decode: bool, ahead: bool = False) -> None:
        self._media = media
        self._decode = decode
        root = media.root
        self._other = (
            LookingAhead(root, decode=decode) if ahead and isinstance(root, FolderRoot) else None
        )
        self._wrong: dict[str, InputError] = {}
        self._sizes: dict[int, int] = {}  # hash of a name -> both sides in one number
        self._clips: dict[str, ClipSize] = {}

    def expect(self, entries: Iterable[Any]) -> None:
        """The other process, if there is one, looks at the pictures that these entries name."""
        if self._other is None:
            return
        for name, found in self._other.answers():
            if isinstance(found, InputError):
                self._wrong[name] = found
            else:
                self._keep(name, found)
        names = {name: None for entry in entries for name in _pictures_of(entry)}
        self._other.ask([n for n in names if hash(n) not in self._sizes and n not in self._wrong])

    def close(self) -> None:
        """End the other process."""
        if self._other is not None:
            self._other.close()

    def picture(self, name: str) -> Size:
        """A picture's size; raises as `ImageRoot.check`."""
        known = self._sizes.get(hash(name))
        if known is not None:
            return known >> 32, known & 0xFFFFFFFF
        if name in self._wrong:
            raise self._wrong[name]
        size = self._media.root.check(name, decode=self._decode)
        self._keep(name, size)
        return size

    def _keep(self, name: str, size: Size) -> None:
        width, height = size
        self._sizes[hash(name)] = width << 32 | height

    def clip(self, name: str) -> ClipSize:
        """What is shown of a video; raises as `ImageRoot.stream` and `vqguard.videos.check_clip`.

        A broken body shows up when the video is decoded, and is named then; with `decode` that is
        done here.
        """
        if name not in self._clips:
            root, frames = self._media.root, self._media.frames
            with root.stream(name) as stream:
                self._clips[name] = check_clip(stream, root.where(name), frames)
            if self._decode:
                self._media.clip(name)()
        return self._clips[name]


def _pictures_of(entry: Any) -> list[str]:
    """The names of an entry's pictures, as far as they are some."""
    if not isinstance(entry, dict):
        return []
    named = [entry.get("image"), entry.get("images")]
    flat = [name for part in named for name in (part if isinstance(part, list) else [part])]
    return [name for name in flat if isinstance(name, str)]


def names_of(entry: dict[str, Any], kind: str, where: str) -> list[str]:
    """The paths under `kind` ("image" or "video") or its plural, one or a list.

    Raises:
        DataError: both are there, or what is there are no paths.
    """
    one, several = entry.get(kind), entry.get(f"{kind}s")
    if kind == "video" and one == "":  # as merged tables fill what a row lacks
        one = None
    if one is not None and several:
        raise DataError(f"{where}: has {kind!r} and '{kind}s'. Put all its {kind}s into one.")
    named = several if one is None else one
    names = [] if named is None else named if isinstance(named, list) else [named]
    for name in names:
        if not isinstance(name, str):
            raise DataError(
                f"{where}: {kind!r} must be a path or a list of paths, got {type(name).__name__}."
            )
    return names
