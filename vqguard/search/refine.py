"""The compiled loops over the bounds of the pruned search. Importing this module imports numba.

They run as those of `kernels` do, and their sums may be taken in any order as well.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from vqguard.search.kernels import CHUNK, Array, compiled, distance, numba

ir: Any = importlib.import_module("llvmlite.ir")
intrinsic: Any = numba.extending.intrinsic
types: Any = numba.types

CANDIDATES = 32
"""Codewords that may still tie for a token after the float32 distances."""
LANES = 256
"""Codewords that are LANES apart share a least bound, so that few are looked at twice."""
LINE = 64
"""Bytes of a cache line."""


def _bounds_float32(
    g: Array, scales: Array, half: Array, near: Array, far: Array, query: Array, v: Array
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
    g: Array, scales: Array, half: Array, near: Array, far: Array, query: Array, v: Array
) -> None:
    """The same for the bits (uint16) of bfloat16 products."""
    bits = v.view(np.uint32)
    for j in range(g.shape[0]):
        bits[j] = np.uint32(g[j]) << np.uint32(16)
    f, apart, coarse = query[0], query[1], query[3]
    for j in range(g.shape[0]):
        v[j] = half[j] - (v[j] + coarse * abs(v[j]) + f * near[j] + apart * far[j])


def _bounds_int8(
    g: Array, scales: Array, half: Array, near: Array, far: Array, query: Array, v: Array
) -> None:
    """The same for sums (int32) of products of int8, which are exact: c is no part of it."""
    f, apart, scale = query[0], query[1], query[2]
    for j in range(g.shape[0]):
        product = np.float32(g[j]) * scales[j]
        v[j] = half[j] - (product * scale + f * near[j] + apart * far[j])


def _lanes(v: Array, lanes: Array) -> None:
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


def _under(limit: Any, v: Array, lanes: Array, chosen: Array) -> int:
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


def _least(v: Array, lanes: Array) -> int:
    """The place of the smallest bound."""
    lane = int(np.argmin(lanes))
    j = lane
    while v[j] != lanes[lane]:
        j += LANES
    return j


bounds_float32: Any = compiled(_bounds_float32)
bounds_bfloat16: Any = compiled(_bounds_bfloat16)
bounds_int8: Any = compiled(_bounds_int8)
least_of_lanes: Any = compiled(_lanes)
under: Any = compiled(_under)
least: Any = compiled(_least)


@intrinsic  # type: ignore[untyped-decorator]
def fetch_ahead(typing: Any, address: Any) -> Any:
    """Ask for the cache line at `address`, an integer, before it is read. Any address will do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        # to read, into the second-level cache, data
        builder.call(fetch, [pointer, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.intp), generate


def _inner(y: Array, numbers: Array, j: int, later: int) -> float:
    """Product of y and numbers[j], int8: chunks in float32, added in float64 (see `distance`).

    numbers[later] is what comes next: a row waits for memory longer than its product takes.
    """
    width = y.shape[0]
    whole = width - width % CHUNK
    ahead = numbers.ctypes.data + later * width
    total = 0.0
    for start in range(0, whole, CHUNK):
        for line in range(start, start + CHUNK, LINE):
            fetch_ahead(ahead + line)
        part = np.float32(0.0)
        for k in range(CHUNK):
            part += y[start + k] * np.float32(numbers[j, start + k])
        total += np.float64(part)
    part = np.float32(0.0)
    for k in range(whole, width):
        part += y[k] * np.float32(numbers[j, k])
    return float(total + np.float64(part))


inner: Any = compiled(_inner)


def _look_again(
    x: Array,
    centre: Array,
    begin: int,
    numbers: Array,
    rounded: Array,
    half: Array,
    length: float,
    threshold: float,
    v: Array,
    chosen: Array,
    count: int,
) -> int:
    """Number of the `count` codewords begin + chosen whose second bound is up to `threshold`.

    They stay in `chosen`, with that bound in `v`. `numbers` (P, d) int8 and `rounded` (2, P),
    scales and missed lengths, are of the `SecondBound`; `half` (n,) of the panel; `length` is
    |x - centre| from above. A codeword whose v is infinite is left out.
    """
    y = np.empty(x.shape[0], np.float32)
    for k in range(x.shape[0]):
        y[k] = x[k] - centre[k]
    kept = 0
    for t in range(count):
        j = chosen[t]
        if v[j] == np.inf:
            continue
        scale, missed = np.float64(rounded[0, begin + j]), np.float64(rounded[1, begin + j])
        later = begin + chosen[min(t + 1, count - 1)]
        known = scale * inner(y, numbers, begin + j, later)
        bound = np.float64(half[j]) - (known + length * missed)
        if bound <= threshold:
            v[j] = bound
            chosen[kept] = j
            kept += 1
    return kept


look_again: Any = compiled(_look_again)


def _reach_of(top: float, limits: Array) -> tuple[Any, float]:
    """Limits of the bounds of codewords within `top`, a squared distance: float32 and float64."""
    reach = np.sqrt(top) + limits[1]
    threshold = 0.5 * (reach * reach - limits[0]) + limits[2]
    return np.float32(threshold + abs(threshold) * 2.0**-22), threshold


reach_of: Any = compiled(_reach_of)


def _refine(
    first: int,
    last: int,
    begin: int,
    x: Array,
    words: Array,
    products: Array,
    bounds: Any,
    described: Array,
    centre: Array,
    numbers: Array,
    rounded: Array,
    factors: Array,
    limits: Array,
    constants: Array,
    state: Array,
    near: Array,
    seen: Array,
    tops: Array,
) -> None:
    """Nearest codewords of tokens whose products with a panel of codewords are known to a margin.

    The panel is words[begin : begin + n]; panels come one after the other. `products` (m, n).
    `described` (4, P) float32: scales, halves and two columns of the codewords. factors (m, 4): two
    factors of the columns, the token's scale, and c. With g_j the product, times both scales where
    there are any, v_j = half_j - (g_j + c |g_j| + sum_t factors_t columns_tj), which `bounds`
    computes, is never above (|y - z_j|^2 - |y|^2) / 2. `centre`, `numbers` and `rounded` make the
    second bound (see `_look_again`); without rows in `numbers` there is none. limits (m, 4)
    float64: |y|^2 less its error, the length by which y and z may miss x and e, an absolute slack
    of v, and |y|. constants float64: the relative and the absolute error of `distance`, the most
    distances a token may take, the distances that a token done is worth, the distances a token that
    the slice may waste, and what a second look costs in distances.

    state (m,) int64: 0 before the first panel; then the number of candidates, whose indices are in
    near (m, CANDIDATES) int64, their distances in seen (m, CANDIDATES) float64 and the least upper
    end of a distance in tops (m,) float64, infinite at first; -1 where the token is left to a dense
    search.
    """
    codes = products.shape[1]
    relative, absolute = constants[0], constants[1]
    most, worth, credit = constants[2], constants[3], constants[4] * (last - first)
    twice = numbers.shape[0] > 0
    price = constants[5] if twice else 1.0
    end = begin + codes
    word_scales, half = described[0, begin:end], described[1, begin:end]
    inside, outside = described[2, begin:end], described[3, begin:end]
    v = np.empty(codes, np.float32)
    lanes = np.empty(LANES, np.float32)
    chosen = np.empty(int(most / price) + 1, np.int64)
    for i in range(first, last):
        if state[i] < 0:
            continue
        if credit < 0.0:
            state[i] = -1
            continue
        bounds(products[i], word_scales, half, inside, outside, factors[i], v)
        least_of_lanes(v, lanes)
        kept, top = state[i], tops[i]
        limit, threshold = reach_of(top, limits[i])
        best = least(v, lanes)
        # the smallest bound alone comes first: its distance leaves fewer to look at
        for every in range(2):
            count = 0
            if every == 1:
                count = under(limit, v, lanes, chosen)
            elif v[best] <= limit:
                chosen[0] = best
                count = 1
            if count * price > most:
                kept = -1
                break
            if twice and count > 0 and kept > 0:
                credit -= price * count
                count = look_again(
                    x[i],
                    centre,
                    begin,
                    numbers,
                    rounded,
                    half,
                    limits[i, 3],
                    threshold,
                    v,
                    chosen,
                    count,
                )
                if count > most:
                    kept = -1
                    break
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
                    limit, threshold = reach_of(top, limits[i])
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
            if kept < 0:
                break
            v[best] = np.inf  # it was looked at
        tops[i] = top
        state[i] = kept
        if kept > 0:
            credit += worth


refine: Any = compiled(_refine)
