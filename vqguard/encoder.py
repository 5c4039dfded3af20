"""Any vision encoder with a guard behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from vqguard.errors import ConfigError, InputError
from vqguard.guard import GuardOutput, VQGuard
from vqguard.search.settle import tree_sum

Split = Callable[[Any], tuple[Tensor, Tensor]]
"""Encoder output -> (visual tokens (B, N, d), semantic tokens (B, S, d_s))."""


class GuardedEncoder(nn.Module):
    """`encoder`, then the guard: a call returns a `GuardOutput`.

    `encoder` is any callable that returns tokens (B, N, d), a mapping with `last_hidden_state`
    (transformers' outputs are such), or a tuple that begins with the tokens.

    `global_token` says which token is judged: "cls": token 0, which is then not a visual token;
    "mean": the mean of the tokens; or a callable tokens (B, N, d) -> (B, d_s) or (B, S, d_s).
    `split` replaces all of this: encoder output -> (tokens, semantic).

    Nothing is refused here: the caller reads `flagged` of the output.
    """

    def __init__(
        self,
        encoder: Callable[..., Any],
        guard: VQGuard,
        split: Split | None = None,
        global_token: Literal["cls", "mean"] | Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Give exactly one of `split` and `global_token`, else ConfigError."""
        super().__init__()
        if not isinstance(guard, VQGuard):
            raise ConfigError(f"expected a VQGuard, got {type(guard).__name__}")
        if (split is None) == (global_token is None):
            raise ConfigError(
                "give exactly one of split and global_token: whether token 0 is a class token"
                " cannot be seen from outside (global_token='cls' or 'mean')"
            )
        if (
            global_token is not None
            and not callable(global_token)
            and (global_token not in ("cls", "mean"))
        ):
            raise ConfigError(
                f"global_token must be 'cls', 'mean' or a callable, got {global_token!r}"
            )
        self.encoder = encoder
        self.guard = guard
        self.split = split
        self.global_token = global_token

    def forward(self, *args: Any, **kwargs: Any) -> GuardOutput:
        """Arguments go to the encoder. Raises InputError and NonFiniteError as `VQGuard` does."""
        output: GuardOutput = self.guard(*self.features(*args, **kwargs))
        return output

    def features(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Visual tokens (B, N, d) and semantic tokens (B, S, d_s), not quantised, with gradient."""
        found = self.encoder(*args, **kwargs)
        if self.split is not None:
            return self.split(found)
        tokens = _tokens(found)
        if self.global_token == "cls":
            if tokens.shape[1] < 2:
                raise InputError(
                    f"global_token='cls' needs a class token and others, got {tuple(tokens.shape)}"
                )
            return tokens[:, 1:], tokens[:, :1]
        if callable(self.global_token):
            semantic = self.global_token(tokens)
            return tokens, semantic[:, None] if semantic.dim() == 2 else semantic
        return tokens, mean_token(tokens)


def mean_token(tokens: Tensor) -> Tensor:
    """Mean of tokens (B, N, d) over N as (B, 1, d), in float64 and a fixed order.

    An image's mean is the same alone and in a batch, bit for bit.
    """
    if tokens.dim() != 3 or tokens.shape[1] < 1:
        raise InputError(f"expected tokens (images, tokens, width), got {tuple(tokens.shape)}")
    total = tree_sum(tokens.double().transpose(1, 2).clone())
    return (total / tokens.shape[1]).to(tokens.dtype)[:, None]


def _tokens(found: Any) -> Tensor:
    if isinstance(found, Mapping):
        if "last_hidden_state" not in found:
            raise InputError(
                f"the encoder returned {sorted(map(str, found))} without last_hidden_state; give"
                " split=..."
            )
        found = found["last_hidden_state"]
    elif isinstance(found, tuple | list):
        found = found[0] if found else None
    if not isinstance(found, Tensor) or found.dim() != 3:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"the encoder returned {shape}, expected tokens (images, tokens, width); give split=..."
        )
    return found
