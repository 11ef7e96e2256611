"""Steps of decoding that a GPU plays again, as CUDA graphs, instead of being told each kernel.

A step of an 8B model is some thousand kernels of a few microseconds each: telling them one by one
takes longer than running them. What differs from step to step is four numbers a row, the token, its
position, and where the columns of the row's adapter begin and end; everything else stays in its
place. A pass is recorded once for each number of rows and each width of the cache.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from worker.inference.engine.row_cache import GROWTH, RowCache, View
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import AdapterWeights

MOST = 64
"""Graphs kept at a time; each holds some megabytes of the device."""

logger = logging.getLogger(__name__)

Pass = Callable[[torch.Tensor], torch.Tensor]
"""Maps the numbers of each row [n, 4] to its logits [n, vocabulary]."""
Record = Callable[[Pass, torch.Tensor], Pass]
"""Makes of a pass, and numbers to try it with, one that is played again."""


class _Kind(NamedTuple):
    """What a recorded pass is for: it serves all passes of its kind."""

    n_rows: int
    width: int
    has_adapters: bool


class DecodeGraphs:
    """Recorded passes of one token a row; only the engine's thread calls it.

    Args:
        step: Feeds tokens [n, 1] to the rows of a view; returns logits [n, vocabulary].
        rows: The cache, whose rows are reserved.
        slots: The adapters.
        record: Makes of a pass one that is played again.
        dtype: That of the model.
    """

    def __init__(
        self,
        step: Callable[[torch.Tensor, View], torch.Tensor],
        rows: RowCache,
        slots: Slots,
        record: Record,
        dtype: torch.dtype,
    ) -> None:
        self._step = step
        self._rows = rows
        self._slots = slots
        self._record = record
        self._dtype = dtype
        self._kept: OrderedDict[_Kind, Pass] = OrderedDict()
        self._generation = (-1, -1)
        self._can_record = True

    def decode(
        self, tokens: Sequence[int], adapters: Sequence[AdapterWeights | None]
    ) -> torch.Tensor | None:
        """Feed one of `tokens` to each row; return logits [rows, vocabulary] to read at once.

        The slots of `adapters`, one a row, are set as ``Slots.use`` does. None: this pass is not
        one that could be recorded, because an adapter does more than add a product of low rank,
        or because the model cannot be.
        """
        if not self._can_record or any(each and not each.adds_only for each in adapters):
            return None
        rows, lengths = self._rows, self._rows.lengths
        rows.make_room(len(tokens), max(lengths) + 1)
        self._slots.use(adapters)
        if self._generation != (generation := (rows.generation, self._slots.generation)):
            self._kept.clear()
            self._generation = generation
        # Rows beyond those that decode belong to nobody: what is fed to them is overwritten.
        n_rows = min(_rounded(len(tokens)), rows.n_rows)
        width = -(-(max(lengths) + 1) // GROWTH) * GROWTH
        kind = _Kind(n_rows, width, bool(self._slots.active))
        spare = [[0, 0, 0, 0]] * (n_rows - len(tokens))
        own = zip(tokens, lengths, self._slots.low_rank.bounds(), strict=True)
        numbers = torch.tensor([[token, at, *bounds] for token, at, bounds in own] + spare)
        if (step := self._find(kind, numbers)) is None:
            return None
        return step(numbers)[: len(tokens)]

    def _find(self, kind: _Kind, numbers: torch.Tensor) -> Pass | None:
        if (step := self._kept.get(kind)) is not None:
            self._kept.move_to_end(kind)
            return step
        try:
            step = self._record(self._pass_of(kind), numbers)
        except RuntimeError:
            # Some models wait for the device in the middle of a pass, which no graph can hold.
            logger.warning(
                "This model cannot be recorded; each step is a pass of its own.", exc_info=True
            )
            self._can_record = False
            return None
        self._kept[kind] = step
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)
        return step

    def _pass_of(self, kind: _Kind) -> Pass:
        def forward(numbers: torch.Tensor) -> torch.Tensor:
            tokens, positions = numbers[:, 0], numbers[:, 1]
            view = self._rows.view(slice(0, kind.n_rows), positions, kind.width, self._dtype)
            if kind.has_adapters:
                self._slots.use_all(numbers[:, 2:])
            return self._step(tokens[:, None], view)

        return forward


class CudaRecord:
    """Records steps as CUDA graphs, all of which share one pool of memory: one runs at a time.

    Args:
        device: Where the model is, which need not be the first GPU.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        # A pool lasts as long as a graph that uses it: the first one stays.
        self._first: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Pass, numbers: torch.Tensor) -> Pass:
        with torch.cuda.device(self._device):
            return self._recorded(step, numbers.to(self._device))

    def _recorded(self, step: Pass, mine: torch.Tensor) -> Pass:
        # Once as it is: libraries choose kernels and take memory when they first meet a shape.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            step(mine)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        pool: Any = None if self._first is None else self._first.pool()
        # Other threads read adapters and run other models meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = step(mine)
        self._first = self._first or graph

        def play(numbers: torch.Tensor) -> torch.Tensor:
            mine.copy_(numbers)
            graph.replay()
            return logits

        return play


def _rounded(n: int) -> int:
    """Return `n` rounded up to a power of two, or to three quarters of one."""
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if power >= 4 and n <= power * 3 // 4 else power
