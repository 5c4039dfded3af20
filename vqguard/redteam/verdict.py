"""A differentiable stand-in for the safety verdict, for attackers who know that there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.errors import ConfigError, InputError
from vqguard.safety_map import SafetyMap
from vqguard.verdict_rules import require_mask, score_cells, verdict_rule

_NEAR, _SHARPNESS = 16, 0.1


def verdict_hinge(
    features: Tensor,
    codewords: Tensor,
    flagged: Tensor,
    margin: float = 0.02,
    mask: Tensor | None = None,
) -> Tensor:
    """How far an image's semantic features are inside flagged cells, 0 where all are outside.

    With d_f and d_u the squared distances to the nearest flagged and unflagged codeword, the term
    of a token is max(0, (d_u - d_f) / (d_u + d_f) + margin). It has no unit, lies in
    [0, 1 + margin] and is above the margin exactly when the token's code is flagged (up to ties).
    An image's term is the sum over its tokens: where the worst token decides, all must be outside.

    Args:
        features: (B, S, d) semantic features before quantisation.
        codewords: (K, d) the semantic codebook.
        flagged: (K,) bool, the cells that the safety map refuses.
        margin: how far outside counts as safe, as a share of d_u + d_f.
        mask: (B, S) bool, True for an image's own tokens; None: all are.

    Returns:
        (B,) differentiable in the features; zeros where no cell is flagged.

    Raises:
        InputError: shapes that do not fit.
        ConfigError: every cell is flagged: nothing can be evaded.
    """
    if bool(flagged.all()):
        _check(features, codewords, flagged, mask)
        raise ConfigError("every semantic cell is flagged, so no image can evade the verdict")
    nearest = _nearest(features, codewords, flagged, mask)
    if nearest is None:
        return features.new_zeros(len(features))
    terms = (_depth(*nearest) + margin).clamp_min(0.0)
    return (terms if mask is None else terms.where(mask, 0.0)).sum(dim=1)


def denial_hinge(
    features: Tensor,
    codewords: Tensor,
    flagged: Tensor,
    margin: float = 0.02,
    mask: Tensor | None = None,
) -> Tensor:
    """How far an image's nearest token is from a flagged cell, 0 where one is inside by a margin.

    The turned-round `verdict_hinge`, for whoever wants a harmless image refused: one token is
    enough. Outside the cell the squared distance to it is added, as a share of the codewords'
    variance. Arguments, shape and errors are the same.

    Raises:
        ConfigError: no cell is flagged: nothing can be refused.
    """
    if not bool(flagged.any()):
        _check(features, codewords, flagged, mask)
        raise ConfigError("no semantic cell is flagged, so no image can be made to be refused")
    nearest = _nearest(features, codewords, flagged, mask)
    if nearest is None:
        return features.new_zeros(len(features))
    outside = (margin - _depth(*nearest)).clamp_min(0.0)
    # in the middle of a harmless cell the share has no slope: the distance shows the way
    scale = codewords.detach().float().var(dim=0).sum().clamp_min(1e-12)
    terms = outside + (outside > 0) * nearest[0] / scale
    return (terms if mask is None else terms.where(mask, float("inf"))).amin(dim=1)


def rule_excess(
    features: Tensor,
    codewords: Tensor,
    safety_map: SafetyMap,
    margin: float = 0.02,
    mask: Tensor | None = None,
) -> Tensor:
    """How far an image's score under the map's own rule is above tau, straight through the codes.

    The value is exact: max(0, score - tau + margin) / (1 - tau), the score being the rule's over
    the cells that the tokens fall into. Each token's score has the gradient of its expectation
    under a softmax over -d^2 / T, d the distances to all codewords and T a tenth of the mean of the
    16 nearest. So it also knows the way where tokens are pooled, which a hinge a token does not.
    A cell that is flagged for another reason than its score counts as 1, one that is let pass in
    spite of it as the highest score that is safe.

    Args:
        features: (B, S, d) of the level that judges, before quantisation.
        codewords: (K, d).
        safety_map: of that level.
        margin: how far below tau counts as safe.
        mask: (B, S) bool, True for an image's own tokens; None: all are.

    Returns:
        (B,) differentiable in the features.

    Raises:
        InputError: shapes that do not fit.
    """
    cells = torch.arange(safety_map.cells, device=codewords.device)
    flagged = safety_map.flagged(cells.cpu()[:, None]).to(codewords.device)
    _check(features, codewords, flagged, mask)
    rule, tau = verdict_rule(safety_map.rule), safety_map.tau
    scores = score_cells(rule, safety_map).to(codewords.device)
    scores = torch.where(flagged & (scores <= tau), 1.0, scores)
    allowed = max(0.0, tau - margin)
    scores = torch.where(~flagged & (scores > tau), allowed, scores).to(features.dtype)
    words = codewords.detach().to(features.dtype)
    distances = (
        features.square().sum(dim=-1, keepdim=True)
        - 2.0 * features @ words.T
        + words.square().sum(dim=-1)
    ).clamp_min(0.0)
    near = distances.detach().topk(min(_NEAR, len(words)), dim=-1, largest=False).values
    scale = _SHARPNESS * near.mean(dim=-1, keepdim=True)
    soft = torch.softmax(-distances / scale.clamp_min(1e-12), dim=-1) @ scores
    tokens = with_gradient_of(soft, scores[distances.detach().argmin(dim=-1)])
    real = (
        torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device) if mask is None else mask
    )
    image = rule.image_score(tokens, real)
    return ((image - tau + margin) / max(1.0 - tau, margin)).clamp_min(0.0)


def distance_to(
    features: Tensor,
    codewords: Tensor,
    flagged: Tensor,
    mask: Tensor | None = None,
    *,
    wanted: bool,
) -> Tensor:
    """(B,) how far an image is from a verdict: flagged (`wanted`) or not.

    The hinge, and the depth of the token that decides, which has no end: whoever is over the wall
    goes on, away from it, so that rounding and noise do not bring him back.
    """
    depth = verdict_depth(features, codewords, flagged, mask)
    if wanted:
        return denial_hinge(features, codewords, flagged, mask=mask) - depth
    return verdict_hinge(features, codewords, flagged, mask=mask) + depth


def verdict_depth(
    features: Tensor, codewords: Tensor, flagged: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(B,) how deep an image's worst token is inside a flagged cell: (d_u - d_f) / (d_u + d_f).

    In [-1, 1], positive exactly where a token's code is flagged (up to ties). Arguments and errors
    are those of `verdict_hinge`.
    """
    nearest = _nearest(features, codewords, flagged, mask)
    if nearest is None:
        return features.new_full((len(features),), 1.0 if bool(flagged.all()) else -1.0)
    depth = _depth(*nearest)
    return (depth if mask is None else depth.where(mask, -1.0)).amax(dim=1)


def _check(features: Tensor, codewords: Tensor, flagged: Tensor, mask: Tensor | None) -> None:
    if features.ndim != 3 or features.shape[-1] != codewords.shape[-1]:
        raise InputError(
            f"expected semantic features (B, S, {codewords.shape[-1]}), got {tuple(features.shape)}"
        )
    if flagged.shape != codewords.shape[:1] or flagged.dtype != torch.bool:
        raise InputError(
            f"expected flagged as bool ({len(codewords)},), got {flagged.dtype} "
            f"{tuple(flagged.shape)}"
        )
    if mask is not None:
        require_mask(mask, tuple(features.shape[:2]))


def _nearest(
    features: Tensor, codewords: Tensor, flagged: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Squared distances (B, S) to the nearest flagged and unflagged cell; None: all are alike."""
    _check(features, codewords, flagged, mask)
    if bool(flagged.all()) or not bool(flagged.any()):
        return None
    words = codewords.detach().to(features.dtype)
    distances = (
        features.square().sum(dim=-1, keepdim=True)
        - 2.0 * features @ words.T
        + words.square().sum(dim=-1)
    ).clamp_min(0.0)
    return distances[..., flagged].min(dim=-1).values, distances[..., ~flagged].min(dim=-1).values


def _depth(near_flagged: Tensor, near_safe: Tensor) -> Tensor:
    """(B, S) (d_u - d_f) / (d_u + d_f): positive inside flagged cells."""
    total = near_safe + near_flagged
    return (near_safe - near_flagged) / total.clamp_min(torch.finfo(total.dtype).tiny)
