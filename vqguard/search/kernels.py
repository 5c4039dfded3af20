"""The compiled loops over the numbers of vectors. Importing this module imports numba.

Each runs over the tokens [first, last) without Python's lock, so that plain threads share the work;
numba's own parallel loops would abort in forked workers and under concurrent callers. Nothing is
cached on disk: numba's cache is code that would be loaded from a folder.

Sums may be taken in any order (`reassoc`) and contracted; the margins in `bound` allow for that.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqguard.search.bound import LEAST_SCALE, LEVELS

numba: Any = importlib.import_module("numba")

CHUNK = 256
"""Terms of a distance that are added in float32 before float64 takes over."""

LEVELS_ = np.float32(LEVELS)

Array = NDArray[Any]
_ORDER_FREE = {"reassoc", "nsz", "contract", "nnan"}


def compiled(function: Callable[..., Any]) -> Any:
    """The function as machine code that runs without Python's lock and sums in any order."""
    return numba.njit(nogil=True, fastmath=_ORDER_FREE, error_model="numpy")(function)


def _centre_float32(
    first: int, last: int, x: Array, centre: Array, out: Array, squares: Array, lost: Array
) -> None:
    """out[i] = x[i] - centre; squares[i] = |out[i]|^2; lost[i] = 0."""
    for i in range(first, last):
        total = 0.0
        for k in range(x.shape[1]):
            value = x[i, k] - centre[k]
            out[i, k] = value
            total += np.float64(value) * np.float64(value)
        squares[i] = total
        lost[i] = 0.0


def _centre_bfloat16(
    first: int, last: int, x: Array, centre: Array, out: Array, squares: Array, lost: Array
) -> None:
    """out[i] = the bits of x[i] - centre in bfloat16, rounded to nearest, ties to even.

    squares[i] = |y|^2 of the float32 difference y, lost[i] = |y - out[i]|^2.
    """
    width = x.shape[1]
    value = np.empty(width, np.float32)
    bits = value.view(np.uint32)
    rounded = np.empty(width, np.uint32)
    back = rounded.view(np.float32)
    for i in range(first, last):
        for k in range(width):
            value[k] = x[i, k] - centre[k]
        for k in range(width):
            odd = (bits[k] >> np.uint32(16)) & np.uint32(1)
            high = (bits[k] + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            out[i, k] = np.uint16(high)
            rounded[k] = high << np.uint32(16)
        total = 0.0
        gone = 0.0
        for k in range(width):
            total += np.float64(value[k]) * np.float64(value[k])
            difference = np.float64(value[k]) - np.float64(back[k])
            gone += difference * difference
        squares[i] = total
        lost[i] = gone


def _distance(x: Array, words: Array, j: int) -> float:
    """|x - words[j]|^2: float32 differences and squares, chunks added in float64.

    The loop over a whole chunk has a fixed length: the compiler then uses wide instructions, which
    makes it fourteen times as fast.
    """
    width = x.shape[0]
    whole = width - width % CHUNK
    total = 0.0
    for start in range(0, whole, CHUNK):
        part = np.float32(0.0)
        for k in range(CHUNK):
            difference = x[start + k] - words[j, start + k]
            part += difference * difference
        total += np.float64(part)
    part = np.float32(0.0)
    for k in range(whole, width):
        difference = x[k] - words[j, k]
        part += difference * difference
    return float(total + np.float64(part))


def _distances(x: Array, words: Array, order: Array) -> float:
    """Sum of the distances of `x` to words[order], for timing."""
    total = 0.0
    for j in order:
        total += distance(x, words, j)
    return total


def _widen_float32(row: Array, bits: Array, values: Array) -> None:
    values[: row.shape[0]] = row


def _widen_bfloat16(row: Array, bits: Array, values: Array) -> None:
    """`values` is the float32 view of `bits` (uint32); `row` holds bfloat16 bits (uint16)."""
    for j in range(row.shape[0]):
        bits[j] = np.uint32(row[j]) << np.uint32(16)


centre_float32: Any = compiled(_centre_float32)
centre_bfloat16: Any = compiled(_centre_bfloat16)
distance: Any = compiled(_distance)
distances: Any = compiled(_distances)


def _square_lengths(first: int, last: int, rows: Array, widen: Any, out: Array) -> None:
    """out[i] = |rows[i]|^2 in float64."""
    bits = np.empty(rows.shape[1], np.uint32)
    values = bits.view(np.float32)
    for i in range(first, last):
        widen(rows[i], bits, values)
        total = 0.0
        for k in range(rows.shape[1]):
            total += np.float64(values[k]) * np.float64(values[k])
        out[i] = total


def _quantise(
    first: int,
    last: int,
    rows: Array,
    widen: Any,
    numbers: Array,
    scales: Array,
    lengths: Array,
) -> None:
    """scales[i] numbers[i] = rows[i] rounded to whole numbers of at most LEVELS, times a scale.

    lengths (3, m) float64: |rows[i]|^2, the squared length of what rounding dropped, and that of
    what it kept.
    """
    width = rows.shape[1]
    bits = np.empty(width, np.uint32)
    values = bits.view(np.float32)
    rounded = np.empty(width, np.float32)
    for i in range(first, last):
        widen(rows[i], bits, values)
        top = np.float32(0.0)
        for k in range(width):
            top = max(top, abs(values[k]))
        scale = top / np.float32(LEVELS)
        inverse = np.float32(0.0)
        if scale < LEAST_SCALE:
            scale = np.float32(0.0)
        else:
            inverse = np.float32(1.0) / scale
        for k in range(width):
            rounded[k] = min(max(np.rint(values[k] * inverse), -LEVELS_), LEVELS_)
            numbers[i, k] = np.int8(rounded[k])
        total = 0.0
        dropped = 0.0
        kept = 0.0
        for k in range(width):
            value = np.float64(values[k])
            near = np.float64(scale) * np.float64(rounded[k])
            total += value * value
            dropped += (value - near) * (value - near)
            kept += near * near
        scales[i] = scale
        lengths[0, i], lengths[1, i], lengths[2, i] = total, dropped, kept


square_lengths: Any = compiled(_square_lengths)
widen_float32: Any = compiled(_widen_float32)
widen_bfloat16: Any = compiled(_widen_bfloat16)
quantise: Any = compiled(_quantise)
