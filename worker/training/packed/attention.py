"""Attention within each row of a packed batch, and nowhere else.

Registered with ``transformers`` under `NAME`; a model whose attention goes through its interface
then needs no mask. Short rows on a CPU take explicit grouped-query products, whose backward pass
is several times faster than that of the flash kernel there (specs: training, section 2). On a GPU
all rows go through one call of the flash kernel for rows of different lengths. All others take
``scaled_dot_product_attention``, one call each.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional

from worker.kernels.operators import is_supported
from worker.training.packed import layout, pool
from worker.training.packed.flash import HALF_PRECISION
from worker.training.packed.layout import Layout
from worker.training.packed.ways import attention_of

NAME = "tunery_packed"


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
        and rows.longest <= attention_of(query).longest
        and is_causal
        and not windowed
        and not dropout
    ):
        output: torch.Tensor = _ExplicitAttention.apply(query, key, value, scale, rows)
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
        rows: Layout,
    ) -> torch.Tensor:
        projected = [each[0].transpose(0, 1) for each in (query, key, value)]
        output = pool.empty(query, *projected[0].shape)
        ctx.how = attention_of(query)
        saved = ctx.how.attend(projected, None, scale, rows, output)
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.rows, ctx.n_keys = scale, rows, key.shape[1]
        return output[None]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        saved = ctx.saved_tensors  # once: a pass that runs again gives them out once
        n_tokens, n_heads, width = gradient.shape[1:]
        to_projected = [
            pool.empty(gradient, n_tokens, heads, width)
            for heads in (n_heads, ctx.n_keys, ctx.n_keys)
        ]
        outer = gradient[0].contiguous()
        ctx.how.attend_back(outer, saved, None, ctx.scale, ctx.rows, to_projected)
        return (*(each.transpose(0, 1)[None] for each in to_projected), None, None)
