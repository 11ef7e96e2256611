"""Products of bfloat16 by the instruction that processors have for them (AVX512-BF16).

What LLVM does not find in a loop is written for it here: a tile of the result stays in registers
while pairs of numbers are multiplied and added to it, in float32.
"""

from functools import lru_cache
from typing import Any, Final

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
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


@lru_cache(maxsize=1)
def is_supported() -> bool:
    """Tell whether this processor has the instruction, and none that does more at once (AMX)."""
    features = llvmlite.binding.get_host_cpu_features()
    return bool(features.get("avx512bf16")) and not features.get("amx-bf16")


def _tile(n_rows: int, n_wide: int = BLOCK) -> Any:
    """Make the function that adds to a tile of `n_rows` rows and `n_wide` registers of columns.

    It takes addresses, and distances in bytes: of the block of weights [pairs, n_wide, `WIDTH`, 2]
    and of the first row [pairs, 2], bfloat16; how far the next row is, and the next pair of a row;
    the number of pairs; and where the sums [rows, n_wide · `WIDTH`] are, float32.
    """

    def tile(  # noqa: PLR0913 - a loop has its numbers as arguments
        context: Any, weights: Any, rows: Any, by_row: Any, by_pair: Any, n_pairs: Any, sums: Any
    ) -> Any:
        signature = types.void(*(types.int64,) * 6)
        return signature, lambda context, builder, _, arguments: _generate(
            context, builder, (n_rows, n_wide), arguments
        )

    return intrinsic(tile)


def _generate(context: Any, builder: Any, shape: tuple[int, int], arguments: Any) -> Any:
    n_rows, n_wide = shape
    weights, first, by_row, by_pair, n_pairs, sums = arguments
    multiply_add = _instruction(builder.module)
    rows = [builder.add(first, builder.mul(by_row, _I64(n))) for n in range(n_rows)]
    places = [
        [builder.add(sums, _I64((n * n_wide + column) * WIDTH * 4)) for column in range(n_wide)]
        for n in range(n_rows)
    ]
    old = [[_load(builder, place, _SUMS, 4) for place in row] for row in places]
    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("pairs", "pairs.done"))
    builder.branch(loop)

    builder.position_at_end(loop)
    index = builder.phi(_I64)
    index.add_incoming(_I64(0), before)
    tile = [[builder.phi(_SUMS) for _ in row] for row in old]
    at = builder.add(weights, builder.mul(index, _I64(n_wide * WIDTH * 4)))
    columns = [
        _load(builder, builder.add(at, _I64(n * WIDTH * 4)), _PAIRS, 4) for n in range(n_wide)
    ]
    following = builder.add(index, _I64(1))
    new: list[list[Any]] = []
    for row, totals, begun in zip(rows, tile, old, strict=True):
        place = builder.add(row, builder.mul(index, by_pair))
        pair = _everywhere(builder, _load(builder, place, _I32, 4))
        new.append([])
        for column, total, start in zip(columns, totals, begun, strict=True):
            new[-1].append(builder.call(multiply_add, [total, pair, column]))
            total.add_incoming(start, before)
            total.add_incoming(new[-1][-1], loop)
    index.add_incoming(following, loop)
    builder.cbranch(builder.icmp_unsigned("<", following, n_pairs), loop, after)

    builder.position_at_end(after)
    for totals, row in zip(new, places, strict=True):
        for total, place in zip(totals, row, strict=True):
            store = builder.store(total, builder.inttoptr(place, _SUMS.as_pointer()))
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

tile_of_8_by_2: Any = _tile(8, 2)
tile_of_1_by_2: Any = _tile(1, 2)
tile_of_16_by_1: Any = _tile(16, 1)
tile_of_1_by_1: Any = _tile(1, 1)


CHAINS = 4
"""Sums that a narrow tile makes of each row, every fourth pair in one: none waits for another."""


def _narrow_tile(n_rows: int) -> Any:
    """Make the function that adds to a tile of `n_rows` rows and one register of columns.

    It takes what a tile takes. All numbers of rows are summed in the same order.
    """

    def tile(context: Any, weights: Any, rows: Any, by_row: Any, n_pairs: Any, sums: Any) -> Any:
        signature = types.void(*(types.int64,) * 5)
        return signature, lambda context, builder, _, arguments: _chained(
            context, builder, n_rows, arguments
        )

    return intrinsic(tile)


def _chained(context: Any, builder: Any, n_rows: int, arguments: Any) -> Any:
    weights, first, by_row, n_pairs, sums = arguments
    multiply_add = _instruction(builder.module)
    rows = [builder.add(first, builder.mul(by_row, _I64(n))) for n in range(n_rows)]
    places = [builder.add(sums, _I64(n * WIDTH * 4)) for n in range(n_rows)]
    totals = [[cgutils.alloca_once(builder, _SUMS) for _ in range(CHAINS)] for _ in rows]
    for place, chains in zip(places, totals, strict=True):
        builder.store(_load(builder, place, _SUMS, 4), chains[0])
        for chain in chains[1:]:
            builder.store(ir.Constant(_SUMS, [0.0] * WIDTH), chain)

    def step(pair: Any, chain: int) -> None:
        column = _load(builder, builder.add(weights, builder.mul(pair, _I64(WIDTH * 4))), _PAIRS, 4)
        at = builder.mul(pair, _I64(4))
        for row, chains in zip(rows, totals, strict=True):
            same = _everywhere(builder, _load(builder, builder.add(row, at), _I32, 4))
            total = builder.load(chains[chain])
            builder.store(builder.call(multiply_add, [total, same, column]), chains[chain])

    n_whole = builder.udiv(n_pairs, _I64(CHAINS))
    with cgutils.for_range(builder, n_whole) as loop:
        for chain in range(CHAINS):
            step(builder.add(builder.mul(loop.index, _I64(CHAINS)), _I64(chain)), chain)
    done = builder.mul(n_whole, _I64(CHAINS))
    with cgutils.for_range(builder, builder.sub(n_pairs, done)) as loop:
        step(builder.add(done, loop.index), 0)
    for place, chains in zip(places, totals, strict=True):
        a, b, c, d = (builder.load(chain) for chain in chains)
        total = builder.fadd(builder.fadd(a, b), builder.fadd(c, d))
        builder.store(total, builder.inttoptr(place, _SUMS.as_pointer())).align = 4
    return context.get_dummy_value()


def _prefetch(context: Any, address: Any) -> Any:
    """Make the function that has what is at an address brought to the second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), _I32, _I32, _I32])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        place = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        builder.call(fetch, [place, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


prefetch: Any = intrinsic(_prefetch)

narrow_tile_of_4: Any = _narrow_tile(4)
narrow_tile_of_2: Any = _narrow_tile(2)
narrow_tile_of_1: Any = _narrow_tile(1)


def _transpose(by_target: int, n_words: int) -> Any:
    """Make the function that writes the columns of 16 rows of words of 32 bits as rows.

    It takes addresses, of the first row and of where its words go, and how many bytes the next row
    is further on; the next column goes `by_target` bytes further on. Rows have 16 words, or 8.
    """

    def transpose(context: Any, source: Any, by_row: Any, target: Any) -> Any:
        signature = types.void(*(types.int64,) * 3)
        return signature, lambda context, builder, _, arguments: _transposed(
            context, builder, (by_target, n_words), arguments
        )

    return intrinsic(transpose)


def _transposed(context: Any, builder: Any, shape: tuple[int, int], arguments: Any) -> Any:
    by_target, n_words = shape
    source, by_row, target = arguments
    kind = ir.VectorType(_I32, n_words)
    rows = [
        _load(builder, builder.add(source, builder.mul(by_row, _I64(n))), kind, 4)
        for n in range(WIDTH)
    ]
    if n_words < WIDTH:  # a register holds two rows
        both = ir.Constant(_SAME, list(range(WIDTH)))
        halves = zip(rows[:n_words], rows[n_words:], strict=True)
        rows = [builder.shuffle_vector(*pair, both) for pair in halves]
    distance = 1
    while distance < n_words:  # blocks of twice the size swap two quarters (Eklundh 1972)
        low = [i if not i & distance else i - distance + WIDTH for i in range(WIDTH)]
        high = [i + distance if not i & distance else i + WIDTH for i in range(WIDTH)]
        for n in range(n_words):
            if not n & distance:
                pair = rows[n], rows[n + distance]
                rows[n], rows[n + distance] = (
                    builder.shuffle_vector(*pair, ir.Constant(_SAME, mask)) for mask in (low, high)
                )
        distance *= 2
    for n, row in enumerate(rows):
        place = builder.add(target, _I64(n * by_target))
        builder.store(row, builder.inttoptr(place, _SAME.as_pointer())).align = 4
    return context.get_dummy_value()


transpose_to_3: Any = _transpose(3 * WIDTH * 4, WIDTH)
transpose_to_2: Any = _transpose(2 * WIDTH * 4, WIDTH)
transpose_to_1: Any = _transpose(WIDTH * 4, WIDTH)
transpose_8_to_3: Any = _transpose(3 * WIDTH * 4, WIDTH // 2)
