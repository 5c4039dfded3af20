"""The compiled loops of the pruned search. Importing this module imports numba.

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

CANDIDATES = 32
"""Codewords that may still tie for a token after the float32 distances."""
LANES = 256
"""Codewords that are LANES apart share a least bound, so that few are looked at twice."""
CHUNK = 256
"""Terms of a distance that are added in float32 before float64 takes over."""

LEVELS_ = np.float32(LEVELS)

_Array = NDArray[Any]
_ORDER_FREE = {"reassoc", "nsz", "contract", "nnan"}


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, fastmath=_ORDER_FREE, error_model="numpy")(function)


def _centre_float32(
    first: int, last: int, x: _Array, centre: _Array, out: _Array, squares: _Array, lost: _Array
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
    first: int, last: int, x: _Array, centre: _Array, out: _Array, squares: _Array, lost: _Array
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


def _distance(x: _Array, words: _Array, j: int) -> float:
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


def _distances(x: _Array, words: _Array, order: _Array) -> float:
    """Sum of the distances of `x` to words[order], for timing."""
    total = 0.0
    for j in order:
        total += distance(x, words, j)
    return total


def _widen_float32(row: _Array, bits: _Array, values: _Array) -> None:
    values[: row.shape[0]] = row


def _widen_bfloat16(row: _Array, bits: _Array, values: _Array) -> None:
    """`values` is the float32 view of `bits` (uint32); `row` holds bfloat16 bits (uint16)."""
    for j in range(row.shape[0]):
        bits[j] = np.uint32(row[j]) << np.uint32(16)


centre_float32: Any = _compiled(_centre_float32)
centre_bfloat16: Any = _compiled(_centre_bfloat16)
distance: Any = _compiled(_distance)
distances: Any = _compiled(_distances)


def _square_lengths(first: int, last: int, rows: _Array, widen: Any, out: _Array) -> None:
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
    rows: _Array,
    widen: Any,
    numbers: _Array,
    scales: _Array,
    lengths: _Array,
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


square_lengths: Any = _compiled(_square_lengths)
widen_float32: Any = _compiled(_widen_float32)
widen_bfloat16: Any = _compiled(_widen_bfloat16)
quantise: Any = _compiled(_quantise)


def _bounds_float32(
    g: _Array, scales: _Array, half: _Array, near: _Array, far: _Array, query: _Array, v: _Array
) -> None:
    """v[j] = the bound of one token and the panel's codeword j.

    `g` (n,) products. half, near, far and scales (n,): of the codewords; query: the token's factors
    of near and far, its scale, and c of `_refine`. All loops over codewords run from 0 over arrays
    of the panel alone: the compiler uses wide instructions for no others.
    """
    f, apart, coarse = query[0], query[1], query[3]
    for j in range(g.shape[0]):
        v[j] = half[j] - (g[j] + coarse * abs(g[j]) + f * near[j] + apart * far[j])


def _bounds_bfloat16(
    g: _Array, scales: _Array, half: _Array, near: _Array, far: _Array, query: _Array, v: _Array
) -> None:
    """The same for the bits (uint16) of bfloat16 products."""
    bits = v.view(np.uint32)
    for j in range(g.shape[0]):
        bits[j] = np.uint32(g[j]) << np.uint32(16)
    f, apart, coarse = query[0], query[1], query[3]
    for j in range(g.shape[0]):
        v[j] = half[j] - (v[j] + coarse * abs(v[j]) + f * near[j] + apart * far[j])


def _bounds_int8(
    g: _Array, scales: _Array, half: _Array, near: _Array, far: _Array, query: _Array, v: _Array
) -> None:
    """The same for sums (int32) of products of int8, which are exact: c is no part of it."""
    f, apart, scale = query[0], query[1], query[2]
    for j in range(g.shape[0]):
        product = np.float32(g[j]) * scales[j]
        v[j] = half[j] - (product * scale + f * near[j] + apart * far[j])


def _lanes(v: _Array, lanes: _Array) -> None:
    """lanes[k] = the least of v[k], v[k + LANES], ...: the compiler has no wide single minimum."""
    for k in range(LANES):
        lanes[k] = np.inf
    whole = v.shape[0] - v.shape[0] % LANES
    for start in range(0, whole, LANES):
        for k in range(LANES):
            value = v[start + k]
            lanes[k] = value if value < lanes[k] else lanes[k]
    for k in range(v.shape[0] - whole):
        value = v[whole + k]
        lanes[k] = value if value < lanes[k] else lanes[k]


def _under(limit: Any, v: _Array, lanes: _Array, chosen: _Array) -> int:
    """Number of bounds up to `limit`; their places go to `chosen`, as many as it holds."""
    count = 0
    for k in range(LANES):
        if lanes[k] <= limit:
            for j in range(k, v.shape[0], LANES):
                if v[j] <= limit:
                    if count < chosen.shape[0]:
                        chosen[count] = j
                    count += 1
    return count


def _least(v: _Array, lanes: _Array) -> int:
    """The place of the smallest bound."""
    lane = int(np.argmin(lanes))
    j = lane
    while v[j] != lanes[lane]:
        j += LANES
    return j


bounds_float32: Any = _compiled(_bounds_float32)
bounds_bfloat16: Any = _compiled(_bounds_bfloat16)
bounds_int8: Any = _compiled(_bounds_int8)
least_of_lanes: Any = _compiled(_lanes)
under: Any = _compiled(_under)
least: Any = _compiled(_least)


def _refine(
    first: int,
    last: int,
    begin: int,
    x: _Array,
    words: _Array,
    products: _Array,
    bounds: Any,
    described: _Array,
    factors: _Array,
    limits: _Array,
    constants: _Array,
    state: _Array,
    near: _Array,
    seen: _Array,
    tops: _Array,
) -> None:
    """Nearest codewords of tokens whose products with a panel of codewords are known to a margin.

    The panel is words[begin : begin + n]; panels come one after the other. `products` (m, n).
    `described` (4, P) float32: scales, halves and two columns of the codewords. factors (m, 4): two
    factors of the columns, the token's scale, and c. With g_j the product, times both scales where
    there are any, v_j = half_j - (g_j + c |g_j| + sum_t factors_t columns_tj), which `bounds`
    computes, is never above (|y - z_j|^2 - |y|^2) / 2. limits (m, 3) float64: |y|^2 less its error,
    the length by which y and z may miss x and e, and an absolute slack of v. constants float64: the
    relative and the absolute error of `distance`, the most distances a token may take, the
    distances that a token done is worth, and the distances a token that the slice may waste.

    state (m,) int64: 0 before the first panel; then the number of candidates, whose indices are in
    near (m, CANDIDATES) int64, their distances in seen (m, CANDIDATES) float64 and the least upper
    end of a distance in tops (m,) float64; -1 where the token is left to a dense search.
    """
    codes = products.shape[1]
    relative, absolute = constants[0], constants[1]
    most, worth, credit = constants[2], constants[3], constants[4] * (last - first)
    end = begin + codes
    word_scales, half = described[0, begin:end], described[1, begin:end]
    inside, outside = described[2, begin:end], described[3, begin:end]
    v = np.empty(codes, np.float32)
    lanes = np.empty(LANES, np.float32)
    chosen = np.empty(int(most) + 1, np.int64)
    for i in range(first, last):
        if state[i] < 0:
            continue
        if credit < 0.0:
            state[i] = -1
            continue
        bounds(products[i], word_scales, half, inside, outside, factors[i], v)
        least_of_lanes(v, lanes)
        best = -1
        kept = state[i]
        top = tops[i]
        if kept == 0:
            best = least(v, lanes)
            value = distance(x[i], words, begin + best)
            credit -= 1.0
            top = value + relative * value + absolute
            near[i, 0] = begin + best
            seen[i, 0] = value
            kept = 1
        reach = np.sqrt(top) + limits[i, 1]
        threshold = 0.5 * (reach * reach - limits[i, 0]) + limits[i, 2]
        limit = np.float32(threshold + abs(threshold) * 2.0**-22)
        count = under(limit, v, lanes, chosen)
        if count > most:
            state[i] = -1
            continue
        if best >= 0:
            v[best] = np.inf  # its distance is known
        while count > 0:
            # the candidate with the smallest bound comes next
            where = 0
            for t in range(1, count):
                if v[chosen[t]] < v[chosen[where]]:
                    where = t
            j = chosen[where]
            count -= 1
            chosen[where] = chosen[count]
            if v[j] > limit:
                break
            value = distance(x[i], words, begin + j)
            credit -= 1.0
            if value - relative * value - absolute > top:
                continue
            if value + relative * value + absolute < top:
                top = value + relative * value + absolute
                reach = np.sqrt(top) + limits[i, 1]
                threshold = 0.5 * (reach * reach - limits[i, 0]) + limits[i, 2]
                limit = np.float32(threshold + abs(threshold) * 2.0**-22)
                old = kept
                kept = 0
                for t in range(old):
                    if seen[i, t] - relative * seen[i, t] - absolute <= top:
                        near[i, kept], seen[i, kept] = near[i, t], seen[i, t]
                        kept += 1
            if kept == CANDIDATES:
                kept = -1
                break
            near[i, kept] = begin + j
            seen[i, kept] = value
            kept += 1
        tops[i] = top
        state[i] = kept
        if kept > 0:
            credit += worth


refine: Any = _compiled(_refine)
