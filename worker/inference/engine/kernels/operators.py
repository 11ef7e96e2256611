"""The compiled loops as operators on tensors of a CPU, in bfloat16 or float32."""

import numpy as np
import torch

from worker.inference.engine.caches import States
from worker.inference.engine.kernels import loops
from worker.inference.engine.kernels.team import Numbers

_ADD_LOW_RANK = {
    torch.bfloat16: loops.add_low_rank_bfloat16,
    torch.float32: loops.add_low_rank_float32,
}
_RESCALE = {torch.bfloat16: loops.rescale_bfloat16, torch.float32: loops.rescale_float32}
_STORE = {torch.bfloat16: loops.store_bfloat16, torch.float32: loops.store_float32}
_ATTEND = {torch.bfloat16: loops.attend_bfloat16, torch.float32: loops.attend_float32}


def is_supported(dtype: torch.dtype) -> bool:
    return dtype in _ADD_LOW_RANK


def compile_(dtype: torch.dtype) -> None:
    """Compile what tensors of `dtype` need, rather than in the middle of an answer."""
    for loop in (_ADD_LOW_RANK[dtype], _RESCALE[dtype], _STORE[dtype], _ATTEND[dtype]):
        loop.address  # noqa: B018


def add_low_rank_(y: torch.Tensor, x: torch.Tensor, places: Numbers, module: int) -> None:
    """Add what the adapter of each row makes of `x` [rows, …, in] to `y` [rows, …, out], in place.

    Args:
        y: Contiguous, in the dtype of the matrices.
        x: Of the same dtype.
        places: [rows, modules, 3]: where A [r, in] and Bᵀ [r, out] are, and r; 0 where a row has
            none.
        module: Which of the modules this is.

    Raises:
        ValueError: the tensors are of other rows or another dtype.
    """
    x = x.contiguous()
    n_rows, n_modules, _ = places.shape
    if len(x) != n_rows or len(y) != n_rows or x.dtype != y.dtype or not y.is_contiguous():
        raise ValueError(f"{len(x)} rows of {x.dtype} do not go with {n_rows} of {y.dtype}.")
    n_tokens = x.numel() // (n_rows * x.shape[-1])
    numbers = np.array(
        (
            y.data_ptr(),
            x.data_ptr(),
            x.shape[-1],
            y.shape[-1],
            n_rows,
            n_tokens,
            places.ctypes.data + module * places.strides[1],
            3 * n_modules,
        )
    )
    _ADD_LOW_RANK[y.dtype](numbers, n_rows * -(-n_tokens // loops.TOKENS))


def rescale(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return RMSNorm of `x` [..., d] (arXiv 1910.07467, eq. 4), as Llama rounds it."""
    x = x.contiguous()
    y = torch.empty_like(x)
    d = x.shape[-1]
    n_tokens = x.numel() // d
    numbers = np.array((y.data_ptr(), x.data_ptr(), weight.data_ptr(), n_tokens, d, 0))
    numbers.view(np.float64)[5] = epsilon
    _RESCALE[x.dtype](numbers, n_tokens)
    return y


def store_(rows: States, tokens: States, lengths: Numbers) -> None:
    """Write the keys and values of one token a row into rows, as the last of each.

    Args:
        rows: Keys and values, [rows, heads, width, d] each, stored alike, with the tokens of a head
            one after the other.
        tokens: The same, of width 1 and of the same dtype.
        lengths: Of each row with that token [rows], at most the width.
    """
    keys, values = rows
    new_keys, new_values = (each.contiguous() for each in tokens)
    numbers = np.array(
        (
            new_keys.data_ptr(),
            new_values.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            lengths.ctypes.data,
            *(len(new_keys), keys.shape[1], keys.shape[3], keys.stride(0), keys.stride(1)),
        )
    )
    _STORE[keys.dtype](numbers, 1)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: Numbers, scale: float
) -> torch.Tensor:
    """Return attention of one token a row to the first `lengths` tokens of its row.

    Args:
        query: [rows, heads, 1, d].
        keys: [rows, key heads, width, d] with the tokens of a head one after the other.
        values: The same, and stored in the same way.
        lengths: Of each row [rows], at most the width.
        scale: By which scores are multiplied.

    Returns:
        [rows, 1, heads, d].
    """
    n_rows, n_heads, _, d = query.shape
    query = query.contiguous()
    output = query.new_empty(n_rows, 1, n_heads, d)
    numbers = np.array(
        (
            output.data_ptr(),
            query.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            lengths.ctypes.data,
            n_rows,
            n_heads,
            keys.shape[1],
            d,
            keys.stride(0),
            keys.stride(1),
            0,
        )
    )
    numbers.view(np.float64)[11] = scale
    _ATTEND[query.dtype](numbers, n_rows * keys.shape[1])
    return output
