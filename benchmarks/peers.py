"""What the search is compared with, and inputs that are meant to be slow for it."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import torch
from torch import Tensor

Way = Callable[[Tensor], Tensor]


def exact_peers(words: Tensor) -> dict[str, Way]:
    """Name -> nearest codeword of (M, d) by float32 products, for codewords (P, d)."""
    from vector_quantize_pytorch import VectorQuantize

    flat = faiss.IndexFlatL2(words.shape[1])
    flat.add(words.numpy())
    quantiser = VectorQuantize(dim=words.shape[1], codebook_size=words.shape[0]).eval()
    quantiser._codebook.embed.data.copy_(words[None])
    norms = words.square().sum(dim=1)
    return {
        "faiss flat": lambda x: torch.from_numpy(flat.search(x.numpy(), 1)[1][:, 0]),
        "vector-quantize-pytorch": lambda x: quantiser(x[None])[1][0],
        "torch.cdist": lambda x: torch.cdist(x, words).argmin(dim=1),
        "torch product": lambda x: torch.addmm(norms, x, words.T, alpha=-2.0).argmin(dim=1),
    }


def approximate_peers(words: Tensor) -> dict[str, Way]:
    """faiss's HNSW (32 links) and IVF (128 lists, 8 probed), which may miss the nearest."""
    graph = faiss.IndexHNSWFlat(words.shape[1], 32)
    graph.add(words.numpy())
    coarse = faiss.IndexFlatL2(words.shape[1])
    lists = faiss.IndexIVFFlat(coarse, words.shape[1], 128)
    lists.train(words.numpy())
    lists.add(words.numpy())
    lists.nprobe = 8
    return {
        "faiss HNSW": lambda x: torch.from_numpy(graph.search(x.numpy(), 1)[1][:, 0]),
        "faiss IVF": lambda x: torch.from_numpy(lists.search(x.numpy(), 1)[1][:, 0]),
    }


def hostile(words: Tensor, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs (tokens, d) made to defeat the bound, its budget, or the float32 margin."""
    g = torch.Generator().manual_seed(seed)
    codes, dim = words.shape
    centre, spread = words.mean(dim=0), words.std(dim=0)
    few = words[torch.randperm(codes, generator=g)[: min(codes, 2 * dim)]]
    # as far from all as can be: 2 x (e - c) = |e|^2 - mean |e|^2 in the least-squares sense
    z, target = few - centre, (few - centre).square().sum(dim=1)
    gram = z.T @ z
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    equal = torch.linalg.solve(gram, z.T @ (0.5 * (target - target.mean()))) + centre
    least = torch.linalg.eigh(gram).eigenvectors[:, 0]
    pair = torch.randint(codes, (2, tokens), generator=g)
    noise = torch.randn(tokens, dim, generator=g)
    mixed = centre + spread * noise
    mixed[::2] = words[pair[0][::2]] + 0.05 * spread * noise[::2]
    return {
        "Gaussian noise": centre + spread * noise,
        "white noise": centre + spread.mean() * noise,
        "midpoints of codewords": 0.5 * (words[pair[0]] + words[pair[1]]),
        "equally far from all": equal + 1e-3 * spread * noise,
        "flattened by gradient": flattened(words, centre + spread * noise[: max(1, tokens // 12)])
        .repeat(12, 1)[:tokens]
        .contiguous(),
        "far along the least axis": centre + 1e4 * float(spread.norm()) * least * noise[:, :1],
        "every other token hard": mixed,
    }


def flattened(words: Tensor, start: Tensor, steps: int = 20) -> Tensor:
    """`start` (n, d) moved so that as many codewords as possible are about as near as the nearest.

    Adam on the difference between the mean of all squared distances and the least one.
    """
    x = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1 * float(words.std(dim=0).mean()))
    norms = words.square().sum(dim=1)
    for _ in range(steps):
        optimiser.zero_grad()
        scores = norms - 2.0 * x @ words.T
        (scores.mean(dim=1) - scores.amin(dim=1)).sum().backward()
        optimiser.step()
    return x.detach()
