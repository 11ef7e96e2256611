"""Memory in huge pages, which a processor finds its way to faster."""

import mmap
from pathlib import Path

import torch

CHUNK_BYTES = 64 << 20
ALIGNMENT = 64
_HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()


def mapped(n_bytes: int) -> mmap.mmap:
    """Return new memory of the system's, in huge pages where there are such.

    Raises:
        MemoryError: the system gives no more.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        memory = mmap.mmap(-1, n_bytes, flags=flags)
    except OSError as error:
        raise MemoryError(f"can't map {n_bytes:,} bytes: {error}") from error
    if _HAS_HUGE_PAGES:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Shelf:
    """Puts tensors that stay, such as weights, side by side in huge pages.

    The memory is the system's again when all tensors of a chunk are gone.

    Args:
        chunk_bytes: How much is asked of the system at once, at least.
    """

    def __init__(self, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._chunk_bytes = chunk_bytes
        self._chunk = memoryview(b"")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor, aligned to `ALIGNMENT` bytes.

        Raises:
            MemoryError: the system gives no more.
        """
        count = torch.Size(shape).numel()
        n_bytes = -(-count * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        if len(self._chunk) < n_bytes:
            self._chunk = memoryview(mapped(max(self._chunk_bytes, n_bytes)))
        own, self._chunk = self._chunk[:n_bytes], self._chunk[n_bytes:]
        return torch.frombuffer(own, dtype=dtype, count=count).view(shape)
