"""Where the C library puts what is allocated while a base model is loaded."""

import ctypes
import os
import subprocess
import sys

import pytest

from worker.heap import LARGE_BYTES
from worker.launch import MEMORY_ENVIRONMENT

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)
COUNT_MAPS = """
import ctypes
import torch
from worker.heap import passing_allocations

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd",
        "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info

def is_mapped(n_bytes):
    before = libc.mallinfo2().hblks
    tensor = torch.empty(n_bytes, dtype=torch.uint8)
    return libc.mallinfo2().hblks > before

# First, since what was freed before might be taken again.
with passing_allocations():
    print(is_mapped(16 << 20), is_mapped(1 << 10))
print(is_mapped(16 << 20), is_mapped({large}))
"""


def test_what_is_allocated_while_a_base_is_loaded_is_mapped() -> None:
    code = COUNT_MAPS.replace("{large}", str(LARGE_BYTES))
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | MEMORY_ENVIRONMENT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["True", "False", "False", "True"]
