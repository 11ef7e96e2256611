"""Loops run on PyTorch's own threads, whatever else computes, and without a place to keep them."""

import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from numba import carray, types

from worker.kernels import layers, team
from worker.kernels.operators import rescale

WITHOUT_LIBRARY = """
import ctypes
class Without(ctypes.PyDLL):
    def __init__(self, name, **options):
        if name is not None and "gomp" in str(name):
            raise OSError("no such library")
        super().__init__(name, **options)
ctypes.PyDLL = Without
"""
SCRIPT = """
import torch
from worker.kernels import layers, team
print(team._library is None)
print(layers.rescale_float32._compiled._cache.__class__.__name__)
torch.set_num_threads(2)
x = torch.ones(4, 1, 8)
from worker.kernels.operators import rescale
print(torch.equal(rescale(x, torch.ones(8), 0.0), x))
"""


def test_loops_share_the_threads_of_torch() -> None:
    assert team._library is not None, "torch computes by GNU's OpenMP on Linux"
    names = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line and "r-xp" in line
    }
    assert len(names) == 1, names


def test_engines_of_several_threads_run_loops_side_by_side() -> None:
    weight, wrong = torch.ones(64), []

    def check(value: float) -> None:
        x = torch.full((8, 1, 64), value)
        for _ in range(300):
            if not torch.equal(rescale(x, weight, 0.0), torch.ones(8, 1, 64)):
                wrong.append(value)

    threads = [Thread(target=check, args=(value,)) for value in (1.0, 2.0, 4.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_without_the_library_one_thread_does_all() -> None:
    assert run(WITHOUT_LIBRARY + SCRIPT).split() == ["True", "FunctionCache", "True"]


def test_where_nothing_can_be_kept_loops_are_compiled_anew(tmp_path: Path) -> None:
    script = "from numba.core import caching\ncaching.CacheImpl._locator_classes = []\n" + SCRIPT
    assert run(script).split() == ["False", "NullCache", "True"]


def run(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout


def test_a_loop_takes_its_numbers_by_their_address() -> None:
    x, y = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    weight = torch.ones(2)
    numbers = np.array((y.data_ptr(), x.data_ptr(), weight.data_ptr(), 1, 2, 0, 0))
    layers.rescale_float32(numbers, 1)
    torch.testing.assert_close(y, x / 12.5**0.5)


usleep: Any = types.ExternalFunction("usleep", types.int32(types.int32))


def _wait(address: Any) -> None:
    usleep(carray(address, (1,), np.int64)[0])


def test_a_loop_run_aside_lets_others_run_python_meanwhile() -> None:
    loop = team.Loop(_wait)
    loop.aside((0,))  # compiled
    thread = Thread(target=loop.aside, args=((200_000,),))
    thread.start()
    n_turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        n_turns += 1
    assert n_turns > 10


def test_all_loops_can_be_compiled_ahead() -> None:
    code = (
        "import runpy; runpy.run_module('worker.kernels', run_name='__main__')\n"
        "from worker.kernels import causal, masks, pairs, tiles\n"
        "from worker.kernels.training import _ALL\n"
        "ready = [masks.draw, *(loop for each in _ALL for loop in each.values())]\n"
        "if tiles.is_supported():\n"
        "    ready += [*pairs.ALL, *causal.ALL]\n"
        "print(all('_compiled' in vars(loop) for loop in ready))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert run.stdout.split() == ["True"], run.stderr
