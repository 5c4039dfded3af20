"""Files that are written whole or not at all, and SHA-256 of files, tensors and texts."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqguard.bounded import open_regular
from vqguard.errors import ArtefactError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

RESUME_OR_ANOTHER = "Go on with --resume, or name another --output."
LOCK, DRAFT = ".vqguard-lock", ".vqguard-draft-"
"""How the names begin of what a process that was killed may leave in a folder."""
_PIECE = 2**22


@contextmanager
def drafts(*places: Path) -> Iterator[tuple[Path, ...]]:
    """Files to write to, one beside each of `places`, in its folder, which must exist.

    When the block ends they are flushed and take the names of `places`: none of these changes
    before all are on the disk. When it raises, or the disk is full (OSError), what was there stays.
    """
    made: list[Path] = []
    try:
        for place in places:
            draft = place.parent / f"{DRAFT}{secrets.token_hex(8)}"
            # as readable as other files; asking for the umask would change it in all threads
            os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            made.append(draft)
        yield tuple(made)
        for draft in made:
            with draft.open("rb+") as file:
                os.fsync(file.fileno())
        for place, draft in zip(places, made, strict=True):
            draft.replace(place)
    finally:
        for draft in made:
            draft.unlink(missing_ok=True)


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files so that none changes before all are on the disk. Raises OSError."""
    with drafts(*contents) as paths:
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content)


def replace_text(path: Path, text: str) -> None:
    """Write one file in UTF-8, whole or not at all. Raises OSError.

    Half a character, as names of files hold it that are no UTF-8, is written as its escape.
    """
    replace_files({path: text.encode(errors="backslashreplace")})


def require_empty(folder: Path, advice: str) -> None:
    """Refuse to write into a folder that holds something; a missing one is fine.

    Locks and drafts of a process that was killed are nothing.

    Raises ConfigError, which ends with `advice`: what to do instead.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; expected a directory. {advice}")
    if folder.is_dir() and not all(p.name.startswith((LOCK, DRAFT)) for p in folder.iterdir()):
        raise ConfigError(f"{folder} exists and is not an empty directory. {advice}")


def expanded(path: Path) -> Path:
    """The path with `~` and environment variables filled in.

    One that is there as it is written is taken as it is: a file may be called `$HOME`.
    """
    if os.path.lexists(path):
        return path
    try:
        return Path(os.path.expandvars(path.expanduser()))
    except RuntimeError:  # nobody of this name has a home
        return path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces.

    Raises:
        ArtefactError: when it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as stream:
            while piece := stream.read(_PIECE):
                digest.update(piece)
        return digest.hexdigest()
    except (OSError, ValueError) as error:
        raise ArtefactError(f"cannot read {path}: {error}; copy the whole folder") from error


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    return {
        name: hashlib.sha256(tensor_bytes(tensor.detach().cpu())).hexdigest()
        for name, tensor in tensors.items()
    }


def tensor_bytes(tensor: Tensor) -> Any:
    """The bytes of a tensor on the CPU, any shape and dtype, as a flat buffer without a copy."""
    import torch  # records are written, and files hashed, without it

    # numpy's types say that an array is a buffer from 3.12 on
    return tensor.contiguous().flatten().view(torch.uint8).numpy()
