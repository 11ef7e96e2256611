"""Free memory under every limit that a process can have."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from worker.training import memory

GIB = 1 << 30


def test_without_limits_it_is_what_the_machine_has() -> None:
    assert 0 < memory.free_bytes() <= psutil.virtual_memory().available * 1.1


def test_an_address_space_limit_counts() -> None:
    code = (
        "import resource; from worker.training.memory import free_bytes;"
        f"resource.setrlimit(resource.RLIMIT_AS, ({64 * GIB}, resource.RLIM_INFINITY));"
        "import psutil; used = psutil.Process().memory_info().vms;"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {GIB}, resource.RLIM_INFINITY));"
        "print(free_bytes())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) <= GIB
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@pytest.mark.parametrize(("limit", "expected"), [("max", None), ("1000", 400), ("500", 0)])
def test_a_containers_limit_counts(
    limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("600\n")
    assert memory._free_in_cgroup() == expected


def test_weights_are_cached_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Module()
    weight: Any = nn.Parameter(torch.zeros(500, dtype=torch.uint8), requires_grad=False)
    weight.quant_state = SimpleNamespace(dtype=torch.bfloat16)
    model.weight = weight
    monkeypatch.setattr(memory, "free_bytes", lambda device: 8000)
    assert memory.can_cache_weights(model, "cpu")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 7999)
    assert not memory.can_cache_weights(model, "cpu")
    assert not memory.can_cache_weights(model, "cuda:0")


def test_a_job_whose_batches_do_not_fit_succeeds_with_the_same_losses() -> None:
    def run(megabytes: int) -> Any:
        command = [sys.executable, "-m", "tests.worker.training.limited", str(megabytes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    free, limited = run(0), run(100)
    assert free["warnings"] == []
    assert limited["warnings"]
    assert limited["losses"] == pytest.approx(free["losses"], rel=1e-4)
