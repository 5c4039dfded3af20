"""A model's sizes held against its weights, before memory of these sizes is taken.

A `config.json` may ask for a billion words or a million layers. transformers builds the model
without memory first and takes it afterwards; what is built is counted here on the way, and refused
as soon as it exceeds what the folder's weight files can fill.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedConfig

from vqguard.adapters.sizes.configured import CONFIG, read_sizes, require_sizes
from vqguard.bounded import open_regular
from vqguard.errors import ArtefactError

MAX_MODULES = 100_000
"""Modules of a model; each takes some kilobytes of Python. Mixtures of a thousand experts as
modules of their own have 60 000."""
TIMES, FREE = 2, 2**26
"""Numbers that a model may hold: so many times what its files hold, because files leave out what
is tied, and so many beyond, for what no file holds, such as tables of positions."""

_UNFIT = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError),
    StrictDataclassError,
)
"""What classes of transformers, torch and huggingface_hub raise for sizes that do not fit."""
_PACKED = {"U8": 2, "I8": 2, "I32": 8}
"""Numbers of four bits that an integer of a quantised checkpoint may hold."""


def numbers_held(files: Iterable[Path]) -> int:
    """How many numbers the safetensors files hold, by their headers.

    Raises:
        ArtefactError: a file is damaged.
    """
    return sum(
        math.prod(shape) * _PACKED.get(dtype, 1) for path in files for shape, dtype in _parts(path)
    )


def shapes_in(path: Path) -> list[tuple[int, ...]]:
    """The shapes of all tensors of a safetensors file, by its header. Raises `ArtefactError`."""
    return [shape for shape, _ in _parts(path)]


def folder_numbers(folder: Path) -> int:
    """The same of all weights in a folder. Raises `ArtefactError`."""
    return numbers_held(sorted(folder.glob("*.safetensors")))


@contextmanager
def opening(location: str | Path) -> Iterator[None]:
    """While transformers opens the model, without a guard, in a folder or behind a hub id.

    Of a hub id the files are not known beforehand: its modules are counted, its numbers are not.

    Raises:
        ArtefactError: its `config.json` asks for more than is accepted, or than its files hold.
    """
    described(location)
    folder = Path(location)
    with built_within(folder_numbers(folder) if folder.is_dir() else None, location):
        yield


def described(location: str | Path) -> dict[str, Any]:
    """What the `config.json` in a folder or behind a hub id says.

    Raises:
        ArtefactError: it cannot be read, or asks for more than is accepted.
        OSError: it cannot be downloaded.
    """
    if Path(location).is_dir():
        return read_sizes(Path(location))
    config: dict[str, Any] = PreTrainedConfig.get_config_dict(str(location))[0]
    require_sizes(config, f"{location}: {CONFIG}")
    return config


@contextmanager
def built_within(held: int | None, origin: Path | str) -> Iterator[None]:
    """Count the modules, parameters and buffers that this thread builds.

    Args:
        held: how many numbers the files hold that will fill them; None: not known.
        origin: what messages call the model.

    Raises:
        ArtefactError: from within what builds, as soon as it is too much; and for what else
            transformers cannot build.
    """
    thread = threading.get_ident()
    most = math.inf if held is None else TIMES * held + FREE
    numbers = modules = 0

    def count_numbers(_module: Any, name: str, tensor: Any) -> None:
        nonlocal numbers
        if tensor is None or threading.get_ident() != thread:
            return
        numbers += tensor.numel()
        if numbers > most:
            raise ArtefactError(
                f"{origin}: its config.json asks for more than {most:,} numbers, its weight files "
                f"hold {held:,}; they do not belong together (the last was {name!r}, "
                f"{tuple(tensor.shape)}). Copy the whole folder again"
            )

    def count_modules(_module: Any, _name: str, _child: Any) -> None:
        nonlocal modules
        if threading.get_ident() != thread:
            return
        modules += 1
        if modules > MAX_MODULES:
            raise ArtefactError(
                f"{origin}: its config.json asks for more than {MAX_MODULES:,} modules; restore it"
            )

    register: Any = torch_modules
    hooks = (
        register.register_module_parameter_registration_hook(count_numbers),
        register.register_module_buffer_registration_hook(count_numbers),
        register.register_module_module_registration_hook(count_modules),
    )
    try:
        yield
    except torch.OutOfMemoryError:  # of a device, whose sizes are the user's
        raise
    except _UNFIT as error:
        raise ArtefactError(
            f"{origin}: transformers cannot build what its config.json describes "
            f"({type(error).__name__}: {error}); restore the file"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _parts(path: Path) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of each tensor."""
    try:
        open_regular(path).close()  # a pipe would be waited for
        with safe_open(path, framework="pt") as file:
            parts = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  # no mapping
            return [(tuple(part.get_shape()), part.get_dtype()) for part in parts]
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtefactError(f"{path} is damaged ({error}); restore it") from error
