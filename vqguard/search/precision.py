"""Matrix products in full float32, whatever the process has chosen.

Autocast, TF32 (`torch.set_float32_matmul_precision("high")`) and bfloat16 on the CPU ("medium")
would turn a float32 product into a coarser one, and the error margin of the search into a lie. So
would float16 sums of float16 products, which CUDA's libraries may be allowed to form.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FULL = ("ieee", "none")  # "none": nothing was asked for, which is full precision
_lock = threading.Lock()
_users = 0
_saved: dict[str, str] = {}
_NARROW_SUMS = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")
_narrowed: list[str] = []


def _backends() -> dict[str, Any]:
    places = {"cuda": torch.backends.cuda.matmul}
    mkldnn = getattr(torch.backends.mkldnn, "matmul", None)
    if mkldnn is not None:
        places["mkldnn"] = mkldnn
    return {name: place for name, place in places.items() if hasattr(place, "fp32_precision")}


def _enter() -> None:
    cuda: Any = torch.backends.cuda.matmul
    for name in _NARROW_SUMS:  # the first from torch 2.7 on
        if getattr(cuda, name, False):
            _narrowed.append(name)
            setattr(cuda, name, False)
    backends = _backends()
    if not backends:  # torch before 2.9 has the one older switch
        if torch.get_float32_matmul_precision() != "highest":
            _saved["all"] = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        return
    for name, place in backends.items():
        if place.fp32_precision not in _FULL:
            _saved[name] = place.fp32_precision
            place.fp32_precision = "ieee"


def _leave() -> None:
    for name in _narrowed:
        setattr(torch.backends.cuda.matmul, name, True)
    _narrowed.clear()
    backends = _backends()
    for name, value in _saved.items():
        if name == "all":
            torch.set_float32_matmul_precision(value)
        else:
            backends[name].fp32_precision = value
    _saved.clear()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Inside, products on `device` are IEEE float32 and autocast is off; restored afterwards.

    Products of float16 numbers on CUDA are summed in float32.

    The switches are the process's own: overlapping searches in several threads share one change,
    which the last of them undoes.
    """
    global _users
    with _lock:
        if _users == 0:
            _enter()
        _users += 1
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _leave()
