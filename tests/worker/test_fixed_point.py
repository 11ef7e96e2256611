"""The integer grid: what a shift loses is kept in exactly its bits, and comes back."""

import pytest
import torch

from worker import fixed_point
from worker.fixed_point import GRID, from_grid, pack, shift, to_grid, unshift


@pytest.mark.parametrize("bits", [1, 3, 7])
@pytest.mark.parametrize("n", [1, 8, 1001])
def test_a_shift_is_undone_for_numbers_of_both_signs(bits: int, n: int) -> None:
    torch.manual_seed(0)
    numbers = torch.randint(-(2**50), 2**50, (n,))
    scaled, lost = shift(numbers, bits)
    assert torch.equal(scaled, torch.div(numbers, 2**bits, rounding_mode="floor"))
    assert torch.equal(unshift(scaled, bits, lost), numbers)


def test_lost_bits_take_their_number_of_bits_a_value() -> None:
    values = torch.zeros(4, 16, 32, dtype=torch.uint8)
    for bits in range(1, fixed_point.MAX_BITS + 1):
        assert pack(values, bits).nbytes * 8 == bits * values.numel()


def test_a_shift_by_no_bits_loses_nothing_and_keeps_nothing() -> None:
    numbers = torch.arange(-3, 4)
    assert shift(numbers, 0) == (numbers, None)
    assert unshift(numbers, 0, None) is numbers


def test_floats_are_rounded_to_the_nearest_multiple_of_the_grid() -> None:
    step = 1 / GRID
    floats = torch.tensor([1.0, -2.5, 1e4, 0.4 * step, 0.6 * step, -0.6 * step])
    expected = torch.tensor([2**20, -5 * 2**19, 10_000 * 2**20, 0, 1, -1])
    assert torch.equal(to_grid(floats), expected)
    assert torch.equal(from_grid(expected, torch.float32)[:3], floats[:3])
    assert from_grid(expected, torch.bfloat16).dtype is torch.bfloat16
