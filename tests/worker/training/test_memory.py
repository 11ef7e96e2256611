"""Free memory under every limit that a process can have."""

import json
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from tests.worker.training.tiny import VOCABULARY, Losses, make_spec, make_trainer, tiny_llama
from worker.training import memory
from worker.training.objectives.base import Example
from worker.training.task import Outcome

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


@pytest.mark.gpu
def test_a_gpu_without_room_for_a_step_goes_on_in_smaller_parts() -> None:
    """The limit is torch's own for this process, so that the error is the real one."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "initializer_range": 0.02,
    }
    draw = np.random.default_rng(0)
    rows = [
        Example(
            line, draw.integers(VOCABULARY, size=200).astype(np.int32), np.arange(200) > 99, 100
        )
        for line in range(1, 65)
    ]
    numbers = {"n_epochs": 2, "batch_size": 32, "learning_rate_multiplier": 1.0}
    spec = make_spec(hyperparameters=numbers, precision={"type": "bf16"})

    def run() -> tuple[Losses, list[str]]:
        warnings: list[str] = []
        model = tiny_llama(dtype=torch.bfloat16, device="cuda", **sizes)
        trainer = make_trainer(spec, train=rows, model=model, warn=warnings.append)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        losses = Losses()
        outcome = trainer.run(losses, lambda *_: None, lambda: None)
        assert outcome is Outcome.FINISHED
        return losses, warnings

    plenty, silence = run()
    assert silence == []
    peak, whole = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / whole)
    try:
        little, warnings = run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.max_memory_allocated() <= 0.6 * peak
    assert warnings
    assert "a step is computed in parts of at most" in warnings[-1]
    assert little == pytest.approx(plenty, rel=1e-2)
