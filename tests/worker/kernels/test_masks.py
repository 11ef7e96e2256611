"""Masks: their statistics, their independence of threads, and what is done under them."""

import pytest
import torch

from tests.worker.kernels.exact import THREADS
from worker.kernels.training import draw_masks, zero_dropped_

ROWS, WIDTH = 200, 1000


def kept(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Return bool [..., rows, width] of a mask's words."""
    bits = mask[..., None] >> torch.arange(32, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :width].bool()


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.97])
def test_the_share_that_is_dropped_is_the_rate(rate: float) -> None:
    (mask,) = draw_masks([rate], ROWS, WIDTH, 7)
    share = float((~kept(mask, WIDTH)).double().mean())
    assert abs(share - rate) <= 5 * (rate * (1 - rate) / (ROWS * WIDTH)) ** 0.5


def test_rows_columns_masks_and_seeds_are_independent() -> None:
    bits = kept(draw_masks([0.5, 0.5], ROWS, WIDTH, 7), WIDTH).double()
    first, second = bits
    (other,) = kept(draw_masks([0.5], ROWS, WIDTH, 8), WIDTH).double()
    pairs = [(first, second), (first, other)]
    pairs += [(first[n:], first[:-n]) for n in (1, 2, 3)]
    pairs += [(first[:, n:], first[:, :-n]) for n in (1, 2, 3, 16, 31, 32, 33, 64)]
    for one, another in pairs:
        assert abs(float((one * another).mean()) - 0.25) < 5 * (3 / 16 / one.numel()) ** 0.5
    # Each word's value is a number of 32 bits of which every bit is as likely.
    assert (first.mean(0) - 0.5).abs().max() < 6 * (0.25 / ROWS) ** 0.5
    assert (first.mean(1) - 0.5).abs().max() < 6 * (0.25 / WIDTH) ** 0.5


def test_a_mask_depends_on_its_seed_and_place_only() -> None:
    found = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        found.append(draw_masks([0.3, 0.3], 7, 70, 2**63 - 1))
    assert torch.equal(*found)
    (alone,) = draw_masks([0.3], 7, 70, 2**63 - 1)
    assert torch.equal(alone, found[0][0])
    (fewer,) = draw_masks([0.3], 3, 70, 2**63 - 1)
    assert torch.equal(fewer, alone[:3])


@THREADS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 15, 16, 31, 32, 33, 100])
def test_what_is_dropped_is_zeroed_and_nothing_else(
    dtype: torch.dtype, width: int, n_threads: int
) -> None:
    torch.set_num_threads(n_threads)
    (mask,) = draw_masks([0.4], 9, width, 3)
    x = torch.randn(9, width).to(dtype)
    expected = torch.where(kept(mask, width), x, 0)
    around = torch.full((11, width), 5, dtype=dtype)
    inside = around[1:-1].copy_(x)
    zero_dropped_(inside, mask)
    assert torch.equal(inside, expected)
    assert torch.equal(around[[0, -1]], torch.full((2, width), 5, dtype=dtype))


def test_a_mask_of_other_rows_is_refused() -> None:
    (mask,) = draw_masks([0.4], 9, 40, 3)
    for x in (torch.ones(9, 80), torch.ones(7, 40), torch.ones(40, 9).t()):
        with pytest.raises(ValueError, match="does not belong"):
            zero_dropped_(x, mask)


def test_no_rows_have_a_mask() -> None:
    assert draw_masks([0.4], 0, 40, 3).shape == (1, 0, 2)
    assert draw_masks([], 4, 40, 3).shape == (0, 4, 2)
