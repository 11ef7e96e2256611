"""Products of bfloat16 by the instruction that processors have for them (AVX512-BF16).

What LLVM does not find in a loop is written for it here: a tile of the result stays in registers
while pairs of numbers are multiplied and added to it, in float32.
"""

from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

WIDTH = 16
"""Columns whose sums are in one register."""
BLOCK = 3
"""Registers of columns in a tile: with 8 rows, 24 of the 32 there are."""
_INSTRUCTION: Final = "llvm.x86.avx512bf16.dpbf16ps.512"


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_I32, _I64 = ir.IntType(32), ir.IntType(64)
_SUMS = ir.VectorType(ir.FloatType(), WIDTH)
_PAIRS = ir.VectorType(_BFloat(), 2 * WIDTH)
_SAME = ir.VectorType(_I32, WIDTH)


def is_supported() -> bool:
    """Tell whether this processor has the instruction, and none that does more at once (AMX)."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and not features.get("amx-bf16")


def _tile(n_rows: int) -> Any:
    """Make the function that computes a tile of `n_rows` rows.

    It takes addresses, and distances in bytes: of the block of weights [pairs, `BLOCK`, `WIDTH`, 2]
    and of the first row [pairs, 2], bfloat16; how far the next row is; the number of pairs; and
    where the sums [rows, `BLOCK` · `WIDTH`] go, float32.
    """

    def tile(context: Any, weights: Any, rows: Any, by_row: Any, n_pairs: Any, sums: Any) -> Any:
        signature = types.void(*(types.int64,) * 5)
        return signature, lambda context, builder, _, arguments: _generate(
            context, builder, n_rows, arguments
        )

    return intrinsic(tile)


def _generate(context: Any, builder: Any, n_rows: int, arguments: Any) -> Any:
    weights, first, by_row, n_pairs, sums = arguments
    multiply_add = _instruction(builder.module)
    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("pairs", "pairs.done"))
    rows = [builder.add(first, builder.mul(by_row, _I64(n))) for n in range(n_rows)]
    builder.branch(loop)

    builder.position_at_end(loop)
    index = builder.phi(_I64)
    index.add_incoming(_I64(0), before)
    tile = [[builder.phi(_SUMS) for _ in range(BLOCK)] for _ in rows]
    at = builder.add(weights, builder.mul(index, _I64(BLOCK * WIDTH * 4)))
    columns = [
        _load(builder, builder.add(at, _I64(n * WIDTH * 4)), _PAIRS, WIDTH * 4)
        for n in range(BLOCK)
    ]
    following = builder.add(index, _I64(1))
    for row, old in zip(rows, tile, strict=True):
        place = builder.add(row, builder.mul(index, _I64(4)))
        pair = _everywhere(builder, _load(builder, place, _I32, 4))
        for column, total in zip(columns, old, strict=True):
            total.add_incoming(ir.Constant(_SUMS, None), before)
            total.add_incoming(builder.call(multiply_add, [total, pair, column]), loop)
    index.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, n_pairs), loop, after)

    builder.position_at_end(after)
    for n, old in enumerate(tile):
        for column, total in enumerate(old):
            place = builder.add(sums, _I64((n * BLOCK + column) * WIDTH * 4))
            new = next(value for value, block in total.incomings if block is loop)
            store = builder.store(new, builder.inttoptr(place, _SUMS.as_pointer()))
            store.align = 4
    return context.get_dummy_value()


def _instruction(module: Any) -> Any:
    known = module.globals.get(_INSTRUCTION)
    if known is not None:
        return known
    return ir.Function(module, ir.FunctionType(_SUMS, [_SUMS, _PAIRS, _PAIRS]), _INSTRUCTION)


def _load(builder: Any, address: Any, kind: ir.Type, alignment: int) -> Any:
    loaded = builder.load(builder.inttoptr(address, kind.as_pointer()))
    loaded.align = alignment
    return loaded


def _everywhere(builder: Any, pair: Any) -> Any:
    """Return a register full of one pair of numbers."""
    nothing = ir.Constant(_SAME, ir.Undefined)
    one = builder.insert_element(nothing, pair, _I32(0))
    all_same = builder.shuffle_vector(one, nothing, ir.Constant(_SAME, [0] * WIDTH))
    return builder.bitcast(all_same, _PAIRS)


tile_of_8: Any = _tile(8)
tile_of_4: Any = _tile(4)
tile_of_2: Any = _tile(2)
tile_of_1: Any = _tile(1)
