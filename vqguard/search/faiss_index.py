"""The search on faiss's flat indexes, CPU and GPU, with the same answers as the dense one.

faiss returns the k best by a float32 inner product of the centred queries, widened by a 1, with the
centred codewords, widened by -|z|^2/2. When even the k-th lies beyond the error margin, the nearest
is among the first k - 1 and is settled in float64. All other queries go to the dense search. Around
their mean, vectors are as short as they can be, and so is the margin: features with a large common
part would else leave many queries undecided.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from abc import abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vqguard.search.base import CodewordSearch
from vqguard.search.dense import DenseSearch
from vqguard.search.settle import margin, overflows, settle, squared_norms

_BEST = 8
_ROWS = 4096
_ROUNDING = 2.0**-24 * (1.0 + 1e-6)


def _faiss() -> Any:
    # keeps faiss, an optional package, out of start-up
    return importlib.import_module("faiss")


class _Certified(CodewordSearch):
    """Top k from faiss, accepted only where the margin proves that it holds the nearest."""

    @classmethod
    def problem(cls) -> str | None:
        """Whether faiss is missing."""
        return "faiss is not installed" if importlib.util.find_spec("faiss") is None else None

    def _prepare(self) -> None:
        self._dense = DenseSearch(self.codewords)
        self._centre = self.codewords.double().mean(dim=0).float()
        centred = self.codewords - self._centre
        norms = squared_norms(centred)
        self._largest = math.sqrt(float(norms.max()))
        # beyond float32 no query uses the index (see `overflows`), which must stay finite
        offset = norms.clamp(max=2.0**126).mul_(-0.5).float()
        self._index(torch.cat([centred, offset[:, None]], dim=1))

    def _nearest(self, queries: Tensor) -> Tensor:
        nearest = torch.empty(queries.shape[0], dtype=torch.int64, device=queries.device)
        for start in range(0, queries.shape[0], _ROWS):
            piece = slice(start, start + _ROWS)
            self._search_chunk(queries[piece], nearest[piece])
        return nearest

    def _search_chunk(self, queries: Tensor, into: Tensor) -> None:
        codes, dim = self.codewords.shape
        best = min(_BEST, codes)
        widened = queries.new_ones(len(queries), dim + 1)
        torch.sub(queries, self._centre, out=widened[:, :dim])
        products, indices = self._top(widened, best)
        scores = products.double().mul_(-2.0)
        squares = squared_norms(widened[:, :dim])
        lengths = squares.sqrt()
        error = margin(lengths, self._largest, dim + 1, torch.float32)
        # centring rounds: |y - z| may miss |x - e| by this length (docs/search-margins.md)
        miss = _ROUNDING * (lengths + self._largest) + 2.0**-125 * math.sqrt(dim)
        near_by = (scores[:, 0] + error + squares).clamp_min(0.0).sqrt()
        limit = scores[:, 0] + 2.0 * error + 4.0 * miss * (near_by + miss)
        proven = (indices >= 0).all(dim=1) & ~overflows(lengths, self._largest)
        if best < codes:
            proven &= scores[:, -1] > limit
        near = (scores <= limit[:, None]) & proven[:, None]
        rows, ranks = near.nonzero(as_tuple=True)
        settle(queries, self.codewords, rows, indices[rows, ranks], into)
        open_rows = (~proven).nonzero().flatten()
        if open_rows.numel():
            into[open_rows] = self._dense(queries[open_rows])

    @abstractmethod
    def _index(self, widened: Tensor) -> None:
        """Take the widened codewords (P, d + 1) float32."""

    @abstractmethod
    def _top(self, widened: Tensor, best: int) -> tuple[Tensor, Tensor]:
        """The `best` largest inner products of queries (M, d + 1), descending; their indices."""


class FaissSearch(_Certified):
    """faiss's `IndexFlatIP` on the CPU. Holds a second copy of the codewords."""

    name = "faiss"
    devices = ("cpu",)
    automatic = sys.platform != "darwin"
    """Not on macOS, where torch and faiss bring two OpenMP runtimes."""
    remedy = "pip install 'vqguard[cpu]' (or 'vqguard[gpu]'), or choose search='torch'"

    def _index(self, widened: Tensor) -> None:
        self._flat = _faiss().IndexFlatIP(widened.shape[1])
        self._flat.add(widened.numpy())

    def _top(self, widened: Tensor, best: int) -> tuple[Tensor, Tensor]:
        products, indices = self._flat.search(widened.numpy(), best)
        return torch.from_numpy(products), torch.from_numpy(indices)


class FaissGpuSearch(_Certified):
    """faiss's brute-force kernel on CUDA tensors in place: no host copy, no index on the device.

    Pointers are handed over explicitly: `faiss.contrib.torch_utils` would patch faiss's classes for
    the whole process.
    """

    name = "faiss-gpu"
    devices = ("cuda",)
    remedy = "Install 'vqguard[gpu]' on a machine with a CUDA device, or choose search='torch'"

    @classmethod
    def problem(cls) -> str | None:
        """Why faiss cannot search on a GPU here, or None. Imports faiss."""
        missing = super().problem()
        if missing:
            return missing
        faiss = _faiss()
        if not hasattr(faiss, "bfKnn") or not hasattr(faiss, "StandardGpuResources"):
            return "this faiss was built without GPU support"
        if faiss.get_num_gpus() < 1 or not torch.cuda.is_available():
            return "no CUDA device is visible"
        return None

    @cached_property
    def _resources(self) -> Any:
        return _faiss().StandardGpuResources()

    def _index(self, widened: Tensor) -> None:
        self._widened = widened

    def _top(self, widened: Tensor, best: int) -> tuple[Tensor, Tensor]:
        faiss = _faiss()
        device = widened.device
        products = torch.empty(len(widened), best, dtype=torch.float32, device=device)
        indices = torch.empty(len(widened), best, dtype=torch.int64, device=device)
        number = device.index if device.index is not None else torch.cuda.current_device()
        arguments = faiss.GpuDistanceParams()
        arguments.metric = faiss.METRIC_INNER_PRODUCT
        arguments.k = best
        arguments.dims = widened.shape[1]
        arguments.vectors = faiss.cast_integer_to_float_ptr(self._widened.data_ptr())
        arguments.vectorsRowMajor = True
        arguments.vectorType = faiss.DistanceDataType_F32
        arguments.numVectors = self._widened.shape[0]
        arguments.queries = faiss.cast_integer_to_float_ptr(widened.data_ptr())
        arguments.queriesRowMajor = True
        arguments.queryType = faiss.DistanceDataType_F32
        arguments.numQueries = widened.shape[0]
        arguments.outDistances = faiss.cast_integer_to_float_ptr(products.data_ptr())
        arguments.outIndices = faiss.cast_integer_to_idx_t_ptr(indices.data_ptr())
        arguments.outIndicesType = faiss.IndicesDataType_I64
        arguments.device = number
        # faiss works on its own stream unless it is given torch's: the tensors above are written
        # and read on that one
        stream = torch.cuda.current_stream(device).cuda_stream
        self._resources.setDefaultStream(number, faiss.cast_integer_to_cudastream_t(stream))
        faiss.bfKnn(self._resources, arguments)
        return products, indices
