"""Streams as integers on a grid of 2^-20, which additions and shifts change without any loss.

A float stream scaled by λ in each layer cannot be computed back: dividing by λ multiplies the
rounding error of every layer above by 1/λ. Integers can, if λ = 2^-bits and the bits that the shift
drops are kept (specs: methods, section 6.4; the idea of arXiv 2407.09093).
"""

import torch

GRID = 2.0**20
LIMIT = 2.0**42
"""What a stream may hold; activations of real models stay below 2^14."""
MAX_BITS = 7
_EIGHT = 8


def to_grid(values: torch.Tensor) -> torch.Tensor:
    """Return floats as int64 multiples of 1/`GRID`, rounded to the nearest."""
    return values.float().mul(GRID).round_().to(torch.int64)


def from_grid(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return what int64 grid numbers stand for, rounded to float32 and then to `dtype`."""
    return numbers.to(torch.float32).div_(GRID).to(dtype)


def shift(numbers: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale int64 numbers by 2^-bits, rounding down.

    Returns:
        The scaled numbers, and the bits that were lost as `pack` keeps them, or None for 0 bits.
    """
    if bits == 0:
        return numbers, None
    lost = numbers.bitwise_and(2**bits - 1).to(torch.uint8)
    return numbers >> bits, pack(lost, bits)


def unshift(numbers: torch.Tensor, bits: int, lost: torch.Tensor | None) -> torch.Tensor:
    """Undo `shift`."""
    if lost is None:
        return numbers
    return (numbers << bits) | unpack(lost, bits, numbers.shape)


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Return uint8 `values` below 2^bits, of any shape, in uint8 [bits, ceil(n / 8)].

    Row b holds bit b of every value; the values of eight equal parts of the input share a byte.
    """
    flat = values.flatten()
    n_bytes = -(-flat.numel() // _EIGHT)
    parts = torch.nn.functional.pad(flat, (0, n_bytes * _EIGHT - flat.numel())).view(_EIGHT, -1)
    planes = torch.zeros(bits, n_bytes, dtype=torch.uint8, device=values.device)
    for bit in range(bits):
        for part in range(_EIGHT):
            planes[bit] |= ((parts[part] >> bit) & 1) << part
    return planes


def unpack(planes: torch.Tensor, bits: int, shape: torch.Size) -> torch.Tensor:
    """Undo `pack`; returns uint8 of `shape`."""
    parts = torch.zeros(_EIGHT, planes.shape[1], dtype=torch.uint8, device=planes.device)
    for bit in range(bits):
        for part in range(_EIGHT):
            parts[part] |= ((planes[bit] >> part) & 1) << bit
    return parts.flatten()[: shape.numel()].view(shape)
