"""The heap of the C library, where it can be told what to do (glibc)."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

LARGE_BYTES = 32 << 20
"""What a trainer allocates that is larger is mapped, and the system's again when it is gone."""
_PASSING_BYTES = 128 << 10
_M_MMAP_THRESHOLD = -3  # malloc.h
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)


@contextmanager
def passing_allocations() -> Iterator[None]:
    """Map what is allocated meanwhile from 128 KiB on, where no hole in the heap has room for it.

    Most of it is to be gone afterwards: weights that are read to be quantised. They would leave
    holes between those that stay, and glibc before 2.38 fills few of them: an aligned block fits
    only where there is more room than it takes (its bug 14581). How much that is depends on where
    things happen to lie, up to 400 MB with a base model of 270. Afterwards what is smaller than
    `LARGE_BYTES` is on the heap again.
    """
    if _mallopt is None:
        yield
        return
    _mallopt(_M_MMAP_THRESHOLD, _PASSING_BYTES)
    try:
        yield
    finally:
        _mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
