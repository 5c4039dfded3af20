"""Caches carry what the language model saw: only those that this guard watched are taken.

transformers renamed `past_key_values` and `cache_params` to `cache` and takes all three: `generate`
renames them after the guard has looked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vqguard.errors import BypassError

if TYPE_CHECKING:
    from vqguard.adapters.runtime.guard_link import GuardLink

NAMES = ("past_key_values", "cache", "cache_params")


@dataclass
class CacheTag:
    """Written on every cache that a guarded model filled.

    `length`: tokens it held then. `flagged` (B,) bool on the CPU: rows that saw a flagged image;
    None when an image was not judged because the guard has no safety map.
    """

    identity: str
    length: int
    flagged: Tensor | None


def cache_in(call: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, None without one.

    Raises:
        BypassError: for two: which of them the model would read cannot be told.
    """
    given = {name: call[name] for name in NAMES if call.get(name) is not None}
    if len({id(cache) for cache in given.values()}) > 1:
        raise BypassError(
            f"got {' and '.join(given)}, which name the same argument: pass one cache, as cache"
        )
    return next(iter(given.values()), None)


def cache_of(output: Any, call: Mapping[str, Any]) -> Any:
    """The cache that a call went on with or made."""
    given = cache_in(call)
    if given is not None:
        return given
    if isinstance(output, tuple):
        parts: list[Any] = list(output)
    else:
        parts = [getattr(output, name, None) for name in NAMES]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def cache_length(cache: Any) -> int:
    """Tokens in a cache, 0 for None.

    Raises:
        BypassError: for what is not a cache.
    """
    if cache is None:
        return 0
    length = getattr(cache, "get_seq_length", None)
    if length is None:
        raise BypassError(
            f"expected past_key_values to be a transformers Cache, got {type(cache).__name__}: "
            "what filled it cannot be told; pass a Cache made by this guarded model, or none"
        )
    return int(length())


def holds_states(cache: Any) -> bool:
    """Whether any layer of a cache holds anything but zeros.

    `get_seq_length` looks at the first layer that counts tokens; a cache may be filled in its
    cross-attention or recurrent layers alone.
    """
    parts = [
        getattr(cache, name, None) for name in ("self_attention_cache", "cross_attention_cache")
    ]
    if any(part is not None for part in parts):
        return any(part is not None and holds_states(part) for part in parts)
    layers = getattr(cache, "layers", None)
    owners = [cache] if layers is None else [cache, *layers]
    return any(_filled(value) for owner in owners for value in vars(owner).values())


def _filled(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.numel() > 0 and bool((value != 0).any())
    if isinstance(value, Mapping):
        return any(_filled(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_filled(item) for item in value)
    return False


def read_tag(link: GuardLink, cache: Any) -> CacheTag | None:
    """The tag of a filled cache, None for an empty one.

    Raises:
        BypassError: for a cache that this guarded model did not fill, or that was filled further
            since: it may hold unquantised images.
    """
    length = cache_length(cache)
    tag = getattr(cache, "_vqguard_tag", None)
    known = isinstance(tag, CacheTag) and tag.identity == link.identity
    if cache is None or (length == 0 and not holds_states(cache)):
        return None
    if not isinstance(tag, CacheTag) or not known or length > tag.length:
        raise BypassError(
            f"past_key_values holds {length} tokens that this guarded model did not put there: "
            "they may carry unquantised images; pass an empty cache, or one that a call of this "
            "model returned"
        )
    return tag


def write_tag(link: GuardLink, cache: Any, before: CacheTag | None, flagged: Tensor | None) -> None:
    """Tag a cache after a guarded call; flags of earlier calls stay."""
    length = cache_length(cache)
    if cache is None or (length == 0 and not holds_states(cache)):
        return
    if before is not None:
        flagged = merge_flags(before.flagged, flagged)
    cache._vqguard_tag = CacheTag(link.identity, length, flagged)


def merge_flags(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    """Rows flagged in either; None (not judged) wins.

    A cache whose rows were repeated or picked since has another batch size: then one flagged row
    before flags every row now.
    """
    if before is None or now is None:
        return None
    if before.shape == now.shape:
        return before | now
    return now | before.any()
