"""The compiled loops as operators on tensors of a CPU, in bfloat16 or float32."""

from collections.abc import Sequence

import numpy as np
import torch

from worker.kernels import Numbers, attention, layers, linear, low_rank, order, tiles
from worker.kernels.team import Loop, bits_of

Loops = dict[torch.dtype, Loop]
"""A loop for each kind of numbers."""
_Pair = tuple[torch.Tensor, torch.Tensor]


def loops(bfloat16: Loop, float32: Loop) -> Loops:
    return {torch.bfloat16: bfloat16, torch.float32: float32}


_ADD_LOW_RANK = loops(low_rank.add_low_rank_bfloat16, low_rank.add_low_rank_float32)
_RESCALE = loops(layers.rescale_bfloat16, layers.rescale_float32)
_ADD_AND_RESCALE = loops(layers.add_and_rescale_bfloat16, layers.add_and_rescale_float32)
_GATE = loops(layers.gate_bfloat16, layers.gate_float32)
_ROTATE = loops(layers.rotate_bfloat16, layers.rotate_float32)
_LARGEST = loops(layers.largest_bfloat16, layers.largest_float32)
_STORE = loops(attention.store_bfloat16, attention.store_float32)
_ATTEND = loops(attention.attend_bfloat16, attention.attend_float32)
_ALL = (
    _ADD_LOW_RANK,
    _RESCALE,
    _ADD_AND_RESCALE,
    _GATE,
    _ROTATE,
    _LARGEST,
    _STORE,
    _ATTEND,
)


def is_supported(dtype: torch.dtype) -> bool:
    return dtype in _ADD_LOW_RANK


def compile_(dtype: torch.dtype) -> None:
    """Compile what tensors of `dtype` need, rather than in the middle of an answer."""
    for each in _ALL:
        each[dtype].address  # noqa: B018
    if dtype == torch.bfloat16 and tiles.is_supported():
        for loop in (linear.multiply_bfloat16, order.order):
            loop.address  # noqa: B018


def add_low_rank_(
    parts: Sequence[tuple[torch.Tensor, int]],
    x: torch.Tensor,
    places: Numbers,
    dtype: torch.dtype,
) -> None:
    """Add what the adapter of each row makes of `x` [rows, …, in] to outputs, in place.

    Args:
        parts: At most 4 outputs [rows, …, out] of modules that take `x`, and which modules they
            are. Of an output each token is contiguous, and tokens follow at equal distances.
        x: What they take.
        places: [rows, modules, 3]: where A [r, in] and Bᵀ [r, out] are, and r; 0 where a row has
            none.
        dtype: Of the matrices, and so of `x` and the outputs.

    Raises:
        ValueError: the tensors are of other rows or another dtype.
    """
    x = x.contiguous()
    *before, n_in = x.shape
    n_rows, n_modules, _ = places.shape
    n_tokens = x.numel() // (n_rows * n_in)
    numbers = [
        *(x.data_ptr(), n_in, n_rows, n_tokens),
        *(places.ctypes.data, 3 * n_modules, len(parts)),
    ]
    for y, module in parts:
        *own, n_out = y.shape
        if own != before or own[0] != n_rows or x.dtype != dtype or y.dtype != dtype:
            raise ValueError(
                f"Adapters of {n_rows} rows in {dtype} do not go with {tuple(x.shape)} in "
                f"{x.dtype} and {tuple(y.shape)} in {y.dtype}."
            )
        numbers += (y.data_ptr(), by_token(y), n_out, module)
    _ADD_LOW_RANK[dtype](numbers, n_rows * n_tokens)


def by_token(x: torch.Tensor) -> int:
    """Return by how many elements the next token of `x` [rows, …, d] is further on.

    Raises:
        ValueError: they do not follow at equal distances, or its numbers not each other.
    """
    if x.is_contiguous():
        return x.shape[-1]
    if x.dim() == 3 and x.shape[1] == 1 and x.stride(2) == 1:  # a step of decoding, most often
        return x.stride(0)
    distance = x.stride(-2) if x.shape[-2] > 1 or x.dim() == 2 else x.stride(-3)
    expected = distance
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size > 1 and stride != expected:
            raise ValueError("The tokens of a tensor do not follow at equal distances.")
        expected *= size
    if x.stride(-1) != 1:
        raise ValueError("The numbers of a token do not follow each other.")
    return distance


def rescale(
    x: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    out: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return RMSNorm of `x` [..., d] (arXiv 1910.07467, eq. 4), as Llama rounds it.

    Args:
        x: What is scaled.
        weight: [d], of the same dtype.
        epsilon: ε.
        out: Contiguous, is filled and returned; a new tensor otherwise.
        factors: float32, one for each token: is filled with what each was multiplied with.
    """
    x = x.contiguous()
    y = torch.empty_like(x) if out is None else out
    d = x.shape[-1]
    n_tokens = x.numel() // d
    kept = 0 if factors is None else factors.data_ptr()
    numbers = (y.data_ptr(), x.data_ptr(), weight.data_ptr(), n_tokens, d, bits_of(epsilon), kept)
    _RESCALE[x.dtype](numbers, n_tokens)
    return y


def add_and_rescale(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    out: _Pair | None = None,
    factors: torch.Tensor | None = None,
) -> _Pair:
    """Return `x` + `z` [..., d], and `rescale` of the sum; `out` is a place for each."""
    x, z = x.contiguous(), z.contiguous()
    total, y = (torch.empty_like(x), torch.empty_like(x)) if out is None else out
    d = x.shape[-1]
    n_tokens = x.numel() // d
    tensors = (y, total, x, z, weight)
    kept = 0 if factors is None else factors.data_ptr()
    numbers = [*(each.data_ptr() for each in tensors), n_tokens, d, bits_of(epsilon), kept]
    _ADD_AND_RESCALE[x.dtype](numbers, n_tokens)
    return total, y


def gated(
    gate: torch.Tensor, value: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return silu(`gate`) · `value` [..., d] (SwiGLU, arXiv 2002.05202, eq. 6), rounded once.

    Raises:
        ValueError: the tokens of one do not follow at equal distances.
    """
    y = gate.new_empty(gate.shape) if out is None else out
    n_tokens = y.numel() // y.shape[-1]
    pointers = (y.data_ptr(), gate.data_ptr(), value.data_ptr())
    numbers = [*pointers, n_tokens, y.shape[-1], by_token(gate), by_token(value)]
    _GATE[y.dtype](numbers, n_tokens)
    return y


def rotated(
    projected: Sequence[torch.Tensor], cosines: torch.Tensor, sines: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values, head by head, with positions in the first two.

    Args:
        projected: Queries, keys and values [rows, tokens, heads · d].
        cosines: Of each position [rows or 1, tokens, d] (RoPE, arXiv 2104.09864, eq. 34, with
            halves for pairs).
        sines: The same.

    Returns:
        [rows, heads, tokens, d] of each.

    Raises:
        ValueError: the tokens of one do not follow at equal distances.
    """
    cosines, sines = cosines.contiguous(), sines.contiguous()
    n_rows, n_tokens, _ = projected[0].shape
    d = cosines.shape[-1]
    heads = [each.shape[-1] // d for each in projected]
    results = [
        each.new_empty(n_rows, n_own, n_tokens, d)
        for each, n_own in zip(projected, heads, strict=True)
    ]
    numbers = [
        *(each.data_ptr() for each in (*results, *projected)),
        *(by_token(each) for each in projected),
        *(cosines.data_ptr(), sines.data_ptr()),
        cosines.stride(0) if len(cosines) > 1 else 0,
        *(n_rows, n_tokens, heads[0], heads[1], d),
    ]
    _ROTATE[projected[0].dtype](numbers, n_rows * n_tokens)
    queries, keys, values = results
    return queries, keys, values


def largest(x: torch.Tensor) -> tuple[list[float], list[int]]:
    """Return the largest number of each row of `x` [n, d], and where it first is.

    It is NaN where any number of the row is; the place then says nothing.
    """
    x = x.contiguous()
    values, places = np.empty(len(x), np.float32), np.empty(len(x), np.int64)
    numbers = [x.data_ptr(), values.ctypes.data, places.ctypes.data, *x.shape]
    _LARGEST[x.dtype](numbers, len(x))
    return values.tolist(), places.tolist()


def store_(rows: _Pair, tokens: _Pair, lengths: Numbers) -> None:
    """Write the keys and values of one token a row into rows, as the last of each.

    Args:
        rows: Keys and values, [rows, heads, width, d] each, stored alike, with the tokens of a head
            one after the other.
        tokens: The same, of width 1 and of the same dtype.
        lengths: Of each row with that token [rows], at most the width.
    """
    keys, values = rows
    new_keys, new_values = (each.contiguous() for each in tokens)
    numbers = (
        new_keys.data_ptr(),
        new_values.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        lengths.ctypes.data,
        *(len(new_keys), keys.shape[1], keys.shape[3], keys.stride(0), keys.stride(1)),
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
    numbers = (
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
        bits_of(scale),
    )
    _ATTEND[query.dtype](numbers, n_rows * keys.shape[1])
    return output
