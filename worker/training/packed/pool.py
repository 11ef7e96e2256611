"""Memory for the large tensors of a pass on a CPU: a heap that holds nothing else.

On the C library's heap, small things that stay (kernels that oneDNN keeps, gradients, casts of
weights) end up between large tensors, and rows of other lengths in the next step fit none of the
holes: within a hundred steps the process is twice as large as what it ever holds, and the kernel
clears pages each time it grows. Here all are gone after their pass, and the heap is whole again.
"""

import math
import threading
import weakref
from bisect import bisect
from collections import deque

import torch

from worker.kernels.memory import ALIGNMENT, CHUNK_BYTES, mapped

SMALLEST_BYTES = 64 << 10
"""Smaller tensors, and those larger than a chunk, are left to torch."""


class _Chunk:
    """One map, and the spans of it that are free, in order and never side by side."""

    def __init__(self) -> None:
        self._whole = memoryview(mapped(CHUNK_BYTES))
        self._starts = [0]
        self._ends = [CHUNK_BYTES]

    @property
    def is_free(self) -> bool:
        return self._ends == [CHUNK_BYTES] and self._starts == [0]

    def take(self, n_bytes: int) -> tuple[memoryview, int] | None:
        """Return the first free `n_bytes` and where they begin, or None if no span is so long."""
        for index, (start, end) in enumerate(zip(self._starts, self._ends, strict=True)):
            if end - start > n_bytes:
                self._starts[index] += n_bytes
            elif end - start == n_bytes:
                del self._starts[index], self._ends[index]
            else:
                continue
            return self._whole[start : start + n_bytes], start
        return None

    def give(self, start: int, end: int) -> None:
        """Take a span back, and join it to the free ones beside it."""
        index = bisect(self._starts, start)
        if index < len(self._starts) and self._starts[index] == end:
            end = self._ends[index]
            del self._starts[index], self._ends[index]
        if index > 0 and self._ends[index - 1] == start:
            self._ends[index - 1] = end
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)


class _Loan(weakref.ref[memoryview]):
    """What one tensor has of a chunk, known to be over when the tensor's buffer is gone."""

    __slots__ = ("chunk", "end", "start")

    chunk: _Chunk
    start: int
    end: int


class Pool:
    """Gives out uninitialised tensors; when one and its views are gone, others get its memory."""

    def __init__(self) -> None:
        self._chunks: list[_Chunk] = []
        self._loans: dict[int, _Loan] = {}
        self._over: deque[_Loan] = deque()
        self._lock = threading.Lock()

    def empty(
        self, like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return an uninitialised tensor of `shape`; dtype and device are those of `like`.

        Raises:
            MemoryError: the system gives no more.
        """
        dtype = dtype or like.dtype
        count = math.prod(shape)
        n_bytes = count * dtype.itemsize
        if like.device.type != "cpu" or not SMALLEST_BYTES <= n_bytes <= CHUNK_BYTES:
            return like.new_empty(shape, dtype=dtype)
        with self._lock:
            span = self._take(-(-n_bytes // ALIGNMENT) * ALIGNMENT)
        return torch.frombuffer(span, dtype=dtype, count=count).view(shape)

    def copy(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a contiguous copy of `x`, in another dtype if one is given."""
        return self.empty(x, *x.shape, dtype=dtype).copy_(x)

    def cast(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return `x` itself if it has this dtype, else a copy."""
        return x if x.dtype == dtype else self.copy(x, dtype)

    def release(self) -> None:
        """Give back to the system what no tensor has; call it when memory has run out."""
        with self._lock:
            self._collect()
            self._chunks = [chunk for chunk in self._chunks if not chunk.is_free]

    def _take(self, n_bytes: int) -> memoryview:
        self._collect()
        for chunk in self._chunks:
            found = chunk.take(n_bytes)
            if found is not None:
                break
        else:
            chunk = _Chunk()
            self._chunks.append(chunk)
            found = chunk.take(n_bytes)
            assert found is not None
        span, start = found
        # The callback may run at any moment, inside this method too, so it only notes the loan.
        loan = _Loan(span, self._over.append)
        loan.chunk, loan.start, loan.end = chunk, start, start + n_bytes
        self._loans[id(loan)] = loan
        return span

    def _collect(self) -> None:
        while self._over:
            loan = self._over.popleft()
            del self._loans[id(loan)]
            loan.chunk.give(loan.start, loan.end)


_POOL = Pool()
empty = _POOL.empty
copy = _POOL.copy
cast = _POOL.cast
release = _POOL.release
