"""Attention within each row of a packed batch, and nowhere else.

Registered with ``transformers`` under `NAME`; a model whose attention goes through its interface
then needs no mask. Short rows on a CPU take explicit grouped-query products, whose backward pass
is several times faster than that of the flash kernel there (specs: training, section 2). On a GPU
all rows go through one call of the flash kernel for rows of different lengths. All others take
``scaled_dot_product_attention``, one call each.
"""

import inspect
import math
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from worker.training.packed import layout, pool
from worker.training.packed.layout import Bucket, Layout

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


@lru_cache(maxsize=64)
def _future(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Return [size, size] with −∞ where a position would see a later one, else 0."""
    return torch.full((size, size), -math.inf, dtype=dtype).triu_(1)


def _shares(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return the probabilities [S·K, G·n, n] of scaled queries [S·K, G·n, D], keys [S·K, n, D]."""
    n = keys.shape[1]
    scores = _bmm(queries, keys.transpose(1, 2))
    by_query = scores.view(len(keys), -1, n, n)
    by_query.add_(_future(n, scores.dtype))
    # The kernel computes in float32 whatever the dtype is.
    return torch.softmax(by_query, -1, out=pool.empty(scores, *by_query.shape)).view_as(scores)


def _bmm(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return the products [N, I, J] of one [N, I, K] and other [N, K, J]."""
    return torch.bmm(one, other, out=pool.empty(one, *one.shape[:2], other.shape[2]))


class _ExplicitAttention(torch.autograd.Function):
    """softmax(s·QKᵀ)·V for buckets of rows; the G = H / K queries of a key head are one product.

    The probabilities, which of all that is kept would grow with the square of a row's length, are
    made again in the backward pass.

    The spare places at the end of a bucket's shorter rows need no mask: they come after all that is
    real, so no real position sees them, and their own results are left out.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        buckets: list[Bucket],
    ) -> torch.Tensor:
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        n_tokens, n_heads, width = query.shape
        n_keys = key.shape[1]
        output = pool.empty(query, n_tokens, n_heads, width)
        saved = []
        for bucket in buckets:
            queries = _heads_first(query, bucket, n_keys).mul_(scale)
            keys, values = (_heads_first(each, bucket, n_keys) for each in (key, value))
            _tokens_first(_bmm(_shares(queries, keys), values), bucket, output)
            saved += [queries, keys, values]
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.buckets, ctx.n_keys = scale, buckets, n_keys
        return output[None]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        saved, n_keys = ctx.saved_tensors, ctx.n_keys
        gradient = gradient[0]
        n_tokens, n_heads, width = gradient.shape
        to_query = pool.empty(gradient, n_tokens, n_heads, width)
        to_key, to_value = (pool.empty(gradient, n_tokens, n_keys, width) for _ in range(2))
        for index, bucket in enumerate(ctx.buckets):
            queries, keys, values = saved[3 * index : 3 * index + 3]
            shares = _shares(queries, keys)
            outer = _heads_first(gradient, bucket, n_keys, spare=0.0)
            _tokens_first(_bmm(shares.transpose(1, 2), outer), bucket, to_value)
            to_shares = _bmm(outer, values.transpose(1, 2))
            to_scores = torch._softmax_backward_data(
                to_shares, shares, -1, shares.dtype, grad_input=pool.empty(shares, *shares.shape)
            )
            back = _bmm(to_scores, keys).mul_(ctx.scale)
            _tokens_first(back, bucket, to_query)
            _tokens_first(_bmm(to_scores.transpose(1, 2), queries), bucket, to_key)
        heads_first = (each.transpose(0, 1)[None] for each in (to_query, to_key, to_value))
        return (*heads_first, None, None)


def _heads_first(
    x: torch.Tensor, bucket: Bucket, n_keys: int, *, spare: float | None = None
) -> torch.Tensor:
    """Return a copy [S·K, G·n, D] of the rows of a bucket from x [T, K·G, D]."""
    width = x.shape[-1]
    rows = x[bucket.start : bucket.end]
    if len(bucket.spare):
        rows = pool.empty(x, len(bucket.gather), *x.shape[1:])
        torch.index_select(x, 0, bucket.gather, out=rows)
        if spare is not None:
            rows.index_fill_(0, bucket.spare, spare)
    split = rows.view(bucket.n_rows, bucket.n, n_keys, -1, width).permute(0, 2, 3, 1, 4)
    return pool.copy(split).view(bucket.n_rows * n_keys, -1, width)


def _tokens_first(x: torch.Tensor, bucket: Bucket, out: torch.Tensor) -> None:
    """Write x [S·K, G·n, D] to the tokens of the bucket in out [T, K·G, D]."""
    split = x.view(bucket.n_rows, -1, bucket.n, out.shape[-1])
    split = split.transpose(1, 2)
    target = out[bucket.start : bucket.end]
    if len(bucket.spare):
        rows = pool.copy(split).view(-1, *out.shape[1:])
        torch.index_select(rows, 0, bucket.real, out=target)
    else:
        target.view(split.shape).copy_(split)
