"""Attention within each row of a packed batch, and nowhere else.

Registered with ``transformers`` under `NAME`; a model whose attention goes through its interface
then needs no mask. Short rows on a CPU take explicit grouped-query products, whose backward pass
is several times faster than that of the flash kernel there (specs: training, section 2). On a GPU
all rows go through one call of the flash kernel for rows of different lengths. All others take
``scaled_dot_product_attention``, one call each.
"""

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from worker.kernels import products
from worker.kernels.operators import is_supported
from worker.kernels.training import (
    Rows,
    Turns,
    causal_softmax_,
    causal_softmax_back_,
    join_heads,
    split_heads,
)
from worker.training.packed import layout, pool
from worker.training.packed.layout import Layout

NAME = "tunery_packed"
EXPLICIT_UP_TO = 1024
"""Longest row, in tokens, for which the whole matrix of probabilities is kept."""
HALF_PRECISION = (torch.bfloat16, torch.float16)
"""What the flash kernel computes in."""


class UnsupportedAttentionError(RuntimeError):
    """The model asks for a kind of attention that is not built here."""


def register() -> None:
    """Make `NAME` known to ``transformers``; doing so again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask inside a packed pass, else that of ``sdpa``."""
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = None if layout.is_active() else sdpa_mask(*args, **kwargs)
    return mask


def packed_attention(  # noqa: PLR0913 - the interface of transformers
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within the rows of the active layout; without one, as ``sdpa`` does.

    Args:
        module: The attention layer; its ``is_causal`` (True if absent) decides the direction.
        query: [1, H, T, D].
        key: [1, K, T, D], where K divides H.
        value: [1, K, T, D].
        attention_mask: None; packing needs none.
        scaling: Factor of the scores; 1/√D if None.
        dropout: Share of the probabilities to drop.
        sliding_window: How many positions a token sees, its own included.

    Returns:
        [1, T, H, D], and None for the probabilities.

    Raises:
        UnsupportedAttentionError: soft-capped scores, attention sinks, or a mask.
    """
    if not layout.is_active():
        return _plain_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **options,
        )
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name)]
    if unknown or attention_mask is not None or query.shape[0] != 1:
        raise UnsupportedAttentionError(", ".join(unknown) or "a mask or several rows")
    is_causal = bool(options.get("is_causal", getattr(module, "is_causal", True)))
    rows = layout.current()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    windowed = sliding_window is not None and rows.longest > sliding_window
    if (
        query.device.type == "cpu"
        and is_supported(query.dtype)
        and rows.longest <= EXPLICIT_UP_TO
        and is_causal
        and not windowed
        and not dropout
    ):
        output: torch.Tensor = _ExplicitAttention.apply(query, key, value, scale, rows.buckets)
        return output, None
    if query.device.type == "cuda" and query.dtype in HALF_PRECISION and not dropout:
        window = sliding_window if windowed else None
        return _flash(query, key, value, scale, rows, is_causal=is_causal, window=window), None
    parts = []
    for start, end in rows.spans:
        mask = _window_mask(end - start, sliding_window, query.device) if windowed else None
        parts.append(
            functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal and mask is None,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, 2).transpose(1, 2), None


def _flash(  # noqa: PLR0913 - what every attention is given
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    rows: Layout,
    *,
    is_causal: bool,
    window: int | None,
) -> torch.Tensor:
    """Return [1, T, H, D] by the flash kernel for rows of different lengths."""
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
    known = _varlen_options()
    options: dict[str, Any] = {}
    if "window_size" in known:
        before = -1 if window is None else window - 1
        options["window_size"] = (before, 0 if is_causal else before)
    elif window is None:
        options["is_causal"] = is_causal
    else:
        raise UnsupportedAttentionError("a sliding window in this version of torch")
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            n_sharing = query.shape[1] // key.shape[1]
            key, value = (each.repeat_interleave(n_sharing, 1) for each in (key, value))
    if "scale" in known:
        options["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)  # the kernel's own is 1/√D
    ends = rows.ends_on(query.device)
    output: Any = varlen_attn(query, key, value, ends, ends, rows.longest, rows.longest, **options)
    whole: torch.Tensor = output[None]
    return whole


@lru_cache(maxsize=1)
def _varlen_options() -> frozenset[str]:
    """Return the names of the kernel's arguments, which torch 2.11 has fewer of than 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _plain_attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *args, **kwargs)


def _window_mask(n: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return bool [n, n], True where position i may see j: 0 ≤ i − j < window."""
    ones = torch.ones(n, n, dtype=torch.bool, device=device)
    return ones.tril() & ones.triu(1 - window) if window is not None else ones.tril()


class _ExplicitAttention(torch.autograd.Function):
    """`attend` as a node of the graph, for queries [1, H, T, D], keys and values [1, K, T, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        buckets: list[Rows],
    ) -> torch.Tensor:
        projected = [each[0].transpose(0, 1) for each in (query, key, value)]
        output = pool.empty(query, *projected[0].shape)
        saved = attend(projected, None, scale, buckets, output)
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.buckets = scale, buckets
        return output[None]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a pass that runs again gives them out once
        n_tokens, n_heads, width = gradient.shape[1:]
        n_keys = saved[1].shape[1]
        to_projected = [
            pool.empty(gradient, n_tokens, heads, width) for heads in (n_heads, n_keys, n_keys)
        ]
        attend_back(gradient[0].contiguous(), saved, None, ctx.scale, ctx.buckets, to_projected)
        return (*(each.transpose(0, 1)[None] for each in to_projected), None, None)


def attend(
    projected: Sequence[torch.Tensor],
    turns: Turns | None,
    scale: float,
    buckets: list[Rows],
    output: torch.Tensor,
) -> list[torch.Tensor]:
    """Compute softmax(s·QKᵀ)·V of each row; the G = H / K queries of a key head are one product.

    The probabilities, which of all that is kept would grow with the square of a row's length, are
    made again in the backward pass. Places after the ends of a bucket's shorter rows hold 0 and
    need no mask: they come after all that is real, so that nothing real sees them.

    Args:
        projected: Queries [T, H, D], keys and values [T, K, D].
        turns: Positions that are put into queries and keys, or None if they are there.
        scale: s.
        buckets: All rows, in groups.
        output: [T, H, D], is filled.

    Returns:
        For each bucket of S rows the scaled queries [S, H, n, D], keys and values [S, K, n, D], as
        `attend_back` needs them.
    """
    saved = []
    for rows in buckets:
        factors, places = (scale, 1.0, 1.0), (turns, turns, None)
        queries, keys, values = (
            split_heads(x, rows, place, factor, out=_heads(x, rows))
            for x, place, factor in zip(projected, places, factors, strict=True)
        )
        saved += [queries, keys, values]
        results = _bmm(_shares(queries, keys), _by_key(values, values))
        join_heads(results.view_as(queries), rows, None, 1.0, out=output)
    return saved


def attend_back(
    gradient: torch.Tensor,
    saved: Sequence[torch.Tensor],
    turns: Turns | None,
    scale: float,
    buckets: list[Rows],
    to_projected: Sequence[torch.Tensor],
) -> None:
    """Fill `to_projected`, shaped as queries, keys and values, from the gradient [T, H, D]."""
    to_query, to_key, to_value = to_projected
    for index, rows in enumerate(buckets):
        queries, keys, values = saved[3 * index : 3 * index + 3]
        shares = _shares(queries, keys)
        outer = split_heads(gradient, rows, None, 1.0, out=_heads(gradient, rows))
        outer = _by_key(outer, values)
        join_heads(
            _bmm(shares.transpose(1, 2), outer).view_as(values), rows, None, 1.0, out=to_value
        )
        to_scores = causal_softmax_back_(_bmm(outer, _by_key(values, values).mT), shares)
        back = _bmm(to_scores, _by_key(keys, keys)).view_as(queries)
        join_heads(back, rows, turns, scale, out=to_query)
        back = _bmm(to_scores.mT, _by_key(queries, keys)).view_as(keys)
        join_heads(back, rows, turns, 1.0, out=to_key)


def _heads(tokens: torch.Tensor, rows: Rows) -> torch.Tensor:
    return pool.empty(tokens, len(rows), tokens.shape[1], rows.n, tokens.shape[2])


def _by_key(x: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return x [S, K·G, n, D] as [S·K, G·n, D], as many as `keys` [S, K, n, D] has heads."""
    return x.view(keys.shape[0] * keys.shape[1], -1, keys.shape[3])


def _shares(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the probabilities [S·K, G·n, n] of scaled queries [S, H, n, D], keys [S, K, n, D]."""
    return causal_softmax_(_bmm(_by_key(queries, keys), _by_key(keys, keys).mT))


def _bmm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the products [N, I, J] of one [N, I, K] and other [N, K, J]."""
    out = pool.empty(one, *one.shape[:2], other.shape[2])
    if products.is_supported(one):
        products.multiply_each_(one, other, out)
        return out
    return torch.bmm(one, other, out=out)
