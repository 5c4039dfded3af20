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

numba: Any = importlib.import_module("numba")

CANDIDATES = 32
"""Codewords that may still tie for a token after the float32 distances."""
LANES = 256
"""Codewords that are LANES apart share a least bound, so that few are looked at twice."""
CHUNK = 256
"""Terms of a distance that are added in float32 before float64 takes over."""

_Array = NDArray[Any]
_ORDER_FREE = {"reassoc", "nsz", "contract", "nnan"}


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, fastmath=_ORDER_FREE, error_model="numpy")(function)


def _centre_float32(
    first: int,
    last: int,
    x: _Array,
    centre: _Array,
    out: _Array,
    squares: _Array,
    lost: _Array,
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
    first: int,
    last: int,
    x: _Array,
    centre: _Array,
    out: _Array,
    squares: _Array,
    lost: _Array,
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


def _distance(x: _Array, e: _Array) -> float:
    """|x - e|^2: float32 differences and squares, chunks added in float64."""
    width = x.shape[0]
    total = 0.0
    for start in range(0, width, CHUNK):
        part = np.float32(0.0)
        for k in range(start, min(start + CHUNK, width)):
            difference = x[k] - e[k]
            part += difference * difference
        total += np.float64(part)
    return total


def _distances(x: _Array, words: _Array, order: _Array) -> float:
    """Sum of the distances of `x` to words[order], for timing."""
    total = 0.0
    for j in order:
        total += distance(x, words[j])
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


square_lengths: Any = _compiled(_square_lengths)
widen_float32: Any = _compiled(_widen_float32)
widen_bfloat16: Any = _compiled(_widen_bfloat16)


def _bounds(
    begin: int,
    g: _Array,
    half: _Array,
    columns: _Array,
    factors: _Array,
    coarse: Any,
    v: _Array,
    lanes: _Array,
) -> None:
    """v[j] = the bound of codeword begin + j, lanes[k] = the least of v[k], v[k + LANES], ...

    The loops are written for the compiler's vector instructions: it does not use them for a single
    running minimum.
    """
    codes = g.shape[0]
    h, near = half[begin : begin + codes], columns[0, begin : begin + codes]
    f = factors[0]
    if columns.shape[0] == 1:
        for j in range(codes):
            v[j] = h[j] - (g[j] + coarse * abs(g[j]) + f * near[j])
    else:
        far, apart = columns[1, begin : begin + codes], factors[1]
        for j in range(codes):
            v[j] = h[j] - (g[j] + coarse * abs(g[j]) + f * near[j] + apart * far[j])
    for k in range(LANES):
        lanes[k] = np.inf
    whole = codes - codes % LANES
    for start in range(0, whole, LANES):
        for k in range(LANES):
            value = v[start + k]
            lanes[k] = value if value < lanes[k] else lanes[k]
    for k in range(codes - whole):
        value = v[whole + k]
        lanes[k] = value if value < lanes[k] else lanes[k]


def _under(limit: Any, v: _Array, lanes: _Array, chosen: _Array) -> int:
    """Number of bounds up to `limit`; their places go to `chosen`, as many as it holds."""
    found = 0
    for k in range(LANES):
        if lanes[k] <= limit:
            for j in range(k, v.shape[0], LANES):
                if v[j] <= limit:
                    if found < chosen.shape[0]:
                        chosen[found] = j
                    found += 1
    return found


def _least(v: _Array, lanes: _Array) -> int:
    """The place of the smallest bound."""
    lane = int(np.argmin(lanes))
    j = lane
    while v[j] != lanes[lane]:
        j += LANES
    return j


bounds: Any = _compiled(_bounds)
under: Any = _compiled(_under)
least: Any = _compiled(_least)


def _refine(
    first: int,
    last: int,
    begin: int,
    x: _Array,
    words: _Array,
    products: _Array,
    widen: Any,
    half: _Array,
    columns: _Array,
    factors: _Array,
    limits: _Array,
    constants: _Array,
    state: _Array,
    near: _Array,
    seen: _Array,
    tops: _Array,
) -> None:
    """Nearest codewords of tokens whose products with a panel of codewords are known to a margin.

    The panel is words[begin : begin + n]; panels come one after the other. `products` (m, n). With
    half (P,), columns (1 or 2, P) and factors (m, 1 or 2), the number
    v_j = half_j - (g_j + c |g_j| + sum_t factors_t columns_tj) is never above
    (|y - z_j|^2 - |y|^2) / 2. limits (m, 3) float64: |y|^2 less its error, the length by which y
    and z may miss x and e, and an absolute slack of v. constants float64: c, the relative and the
    absolute error of `distance`, the most distances a token may take, the distances that a token
    done is worth, and the distances a token that the slice may waste.

    state (m,) int64: 0 before the first panel; then the number of candidates, whose indices are in
    near (m, CANDIDATES) int64, their distances in seen (m, CANDIDATES) float64 and the least upper
    end of a distance in tops (m,) float64; -1 where the token is left to a dense search.
    """
    codes = products.shape[1]
    coarse = np.float32(constants[0])
    relative, absolute = constants[1], constants[2]
    most, worth, credit = constants[3], constants[4], constants[5] * (last - first)
    bits = np.empty(codes, np.uint32)
    values = bits.view(np.float32)
    v = np.empty(codes, np.float32)
    lanes = np.empty(LANES, np.float32)
    chosen = np.empty(int(most) + 1, np.int64)
    for i in range(first, last):
        if state[i] < 0:
            continue
        if credit < 0.0:
            state[i] = -1
            continue
        widen(products[i], bits, values)
        bounds(begin, values, half, columns, factors[i], coarse, v, lanes)
        best = -1
        kept = state[i]
        top = tops[i]
        if kept == 0:
            best = least(v, lanes)
            value = distance(x[i], words[begin + best])
            credit -= 1.0
            top = value + relative * value + absolute
            near[i, 0] = begin + best
            seen[i, 0] = value
            kept = 1
        reach = np.sqrt(top) + limits[i, 1]
        threshold = 0.5 * (reach * reach - limits[i, 0]) + limits[i, 2]
        limit = np.float32(threshold + abs(threshold) * 2.0**-22)
        found = under(limit, v, lanes, chosen)
        if found > most:
            state[i] = -1
            continue
        if best >= 0:
            v[best] = np.inf  # its distance is known
        while found > 0:
            # the candidate with the smallest bound comes next
            where = 0
            for t in range(1, found):
                if v[chosen[t]] < v[chosen[where]]:
                    where = t
            j = chosen[where]
            found -= 1
            chosen[where] = chosen[found]
            if v[j] > limit:
                break
            value = distance(x[i], words[begin + j])
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
