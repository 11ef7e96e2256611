"""The kernels go through the compiler, for GPUs of two generations and in each dtype."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path


def test_every_kernel_compiles_without_a_gpu(tmp_path: Path) -> None:
    told = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.worker.gpu.compiled"],
        env=told | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = Counter(line.split()[0] for line in done.stdout.splitlines())
    assert found == {
        "rescale": 2 * 6,
        "rescale_back": 4 * 6,
        "gate": 6,
        "gate_back": 6,
        "turn": 2 * 6,
        "cross_entropy": 2 * 6,
    }
    assert all(int(line.split()[-1]) > 0 for line in done.stdout.splitlines())
