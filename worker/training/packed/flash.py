"""Causal attention within rows on a GPU: the flash kernel for rows of different lengths.

The kernel keeps the logarithms of the sums of each row's powers, and makes the probabilities again
from them in the backward pass (arXiv 2307.08691).
"""

import sys
from collections.abc import Sequence

import torch

from worker.kernels.training import Turns
from worker.training.packed.attend import Attention
from worker.training.packed.layout import Layout

HALF_PRECISION = (torch.bfloat16, torch.float16)
"""What the kernel computes in."""
LARGEST_HEAD = 256
FIRST_CAPABILITY = (8, 0)
"""Of the devices that the kernel is built for."""


class FlashAttention(Attention):
    """One call for all rows; queries of one key head share it without copies of the key."""

    longest = sys.maxsize

    @staticmethod
    def takes(like: torch.Tensor, width: int) -> bool:
        """Tell whether heads of `width` numbers in the dtype and on the device of `like` go."""
        if like.device.type != "cuda" or like.dtype not in HALF_PRECISION:
            return False
        capability = torch.cuda.get_device_capability(like.device)
        return capability >= FIRST_CAPABILITY and width % 8 == 0 and width <= LARGEST_HEAD

    @staticmethod
    def attend(
        projected: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        output: torch.Tensor,
    ) -> list[torch.Tensor]:
        queries, keys, values = projected
        if turns is not None:
            for each in (queries, keys):
                _turn(each, turns, each)
        ends, longest = rows.ends_on(queries.device), rows.longest
        found, logarithms, *state, _ = torch.ops.aten._flash_attention_forward(
            *(queries, keys, values, ends, ends, longest, longest),
            *(0.0, True, False),  # no dropout, causal, no mask for debugging
            scale=scale,
        )
        output.copy_(found)
        return [queries, keys, values, output, logarithms, *state]

    @staticmethod
    def attend_back(
        gradient: torch.Tensor,
        saved: Sequence[torch.Tensor],
        turns: Turns | None,
        scale: float,
        rows: Layout,
        to_projected: Sequence[torch.Tensor],
    ) -> None:
        *before, rng_state, unused = saved
        ends, longest = rows.ends_on(gradient.device), rows.longest
        sent = torch.ops.aten._flash_attention_backward(
            *(gradient, *before, ends, ends, longest, longest),
            *(0.0, True, rng_state, unused),
            scale=scale,
        )
        places = (None, None, None) if turns is None else (turns, turns, None)
        for own, out, place in zip(sent, to_projected, places, strict=True):
            if place is None:
                out.copy_(own)
            else:
                _turn(own, place, out, back=True)


def _turn(tokens: torch.Tensor, turns: Turns, out: torch.Tensor, *, back: bool = False) -> None:
    from worker.gpu.operators import turn

    turn(tokens, turns, out=out, back=back)
