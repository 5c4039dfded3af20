"""Which features start a codebook: even over what the pictures show, not over their area.

Most visual tokens are background. k-means on a plain sample spends most of its centres there and
few on the objects, which is where naming is lost. Here rare kinds of tokens are drawn more often:
a coarse clustering tells the kinds apart, and a token is drawn with a probability proportional to
the inverse square root of its cluster's size (the usual compromise between the natural and the
even distribution, as word2vec's subsampling takes: Mikolov et al. 2013, arXiv 1310.4546).
"""

from __future__ import annotations

import torch

from vqguard.kmeans import kmeans
from vqguard.search import make_search

_COARSE = 256
_COARSE_POINTS, _COARSE_ITERATIONS = 32768, 6


def balanced_points(features: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """At most ``count`` different rows of ``features`` (n, d) float32, rare kinds more often.

    All rows, in their order, where there are no more than that.
    """
    if len(features) <= count:
        return features
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(features), generator=generator)[:_COARSE_POINTS]
    centres = kmeans(features[sample], min(_COARSE, len(sample)), seed, _COARSE_ITERATIONS)
    kind = make_search(centres)(features)
    sizes = torch.bincount(kind, minlength=len(centres)).double()
    # Exponential races draw without replacement in proportion to the weights, for any n
    # (Efraimidis and Spirakis 2006); torch.multinomial stops at 2^24 rows.
    races = torch.empty(len(features), dtype=torch.float64).exponential_(generator=generator)
    first = (races * sizes.sqrt()[kind]).topk(count, largest=False).indices
    return features[first.sort().values]
