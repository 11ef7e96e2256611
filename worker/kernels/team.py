"""Compiled loops on the threads that PyTorch itself has.

A second pool of threads would wait for the cores on which the first one's still look for work:
where PyTorch computes by GNU's OpenMP, the loops are run by the same library, and so by the same
threads. Elsewhere the calling thread runs them alone.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any, Final

import llvmlite.binding
import torch  # loads the library
from numba import cfunc, config, types

from worker.kernels import cache

OPTIONS: Final[dict[str, Any]] = {
    # Sums in any order, so that they are made side by side; all else is as in IEEE 754.
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
}


_settings: Any = config
_settings.CACHE_DIR = str(cache.folder() or "")


def _team() -> ctypes.PyDLL | None:
    # Python's own lock stays held: a loop is over before another thread could use it.
    try:
        return ctypes.PyDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    except (AttributeError, OSError):  # another system, or another library
        return None


_library = _team()
if _library is not None:
    _run = _library.GOMP_parallel
    _run.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    _run.restype = None
    _member: Any = _library.omp_get_thread_num
    _size: Any = _library.omp_get_num_threads
else:
    _number = ctypes.CFUNCTYPE(ctypes.c_int)
    _member, _size = _number(lambda: 0), _number(lambda: 1)
for _name, _function in (("tunery_member", _member), ("tunery_size", _size)):
    llvmlite.binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

_alone = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_aside = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

member: Any = types.ExternalFunction("tunery_member", types.int32())
"""Inside of a loop: which of its threads this is."""
size: Any = types.ExternalFunction("tunery_size", types.int32())
"""Inside of a loop: how many threads it has."""


class Loop:
    """A function of the address of its numbers, 64 bits each; compiled when first asked for.

    What was compiled is kept beside these files, as long as they stay as they are, for later
    processes. Where nothing can be kept, each compiles anew, which takes seconds.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    @cached_property
    def address(self) -> int:
        return int(self._compiled.address)

    @cached_property
    def _compiled(self) -> Any:
        signature = types.void(types.voidptr)
        try:
            return cfunc(signature, cache=True, **OPTIONS)(self._function)
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
            return cfunc(signature, **OPTIONS)(self._function)

    def __call__(self, numbers: Iterable[int], n_tasks: int) -> None:
        """Run with `numbers`, on as many threads as PyTorch has here if it has `n_tasks` > 1."""
        told = array("q", numbers)  # made, and its address found, in a third of NumPy's time
        address, _ = told.buffer_info()
        if _library is None:
            _alone(self.address)(address)
        else:
            # Two numbers of threads only: with fewer of them, the library lets the others go.
            n_threads = torch.get_num_threads() if n_tasks > 1 else 1
            _run(self.address, address, n_threads, 0)

    def aside(self, numbers: Iterable[int]) -> None:
        """Run with `numbers` on this thread alone, while others run Python.

        For what takes milliseconds, in which nobody else's product should wait for Python's lock.
        The loop asks neither `member` nor `size`.
        """
        told = array("q", numbers)
        address, _ = told.buffer_info()
        _aside(self.address)(address)


@lru_cache(maxsize=1024)
def bits_of(value: float) -> int:
    """Return what a loop that is told numbers reads as this one in float64."""
    (bits,) = array("q", array("d", [value]).tobytes())
    return bits
