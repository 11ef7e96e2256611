"""Recorded steps: they answer what passes told kernel by kernel answer, for any mix of adapters."""

import copy
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config

from tests.worker.inference.engine.test_runner import random_adapter
from tests.worker.inference.tiny import Files, collect, decode_bytes, shapes_of, submit, tiny_llama
from worker.inference.engine.engine import BatchingEngine, Request
from worker.inference.engine.graphs import CudaRecord, Pass, Record, _rounded
from worker.inference.engine.params import Sampling
from worker.inference.engine.scheduler import Limits

N_TOKENS = 12
PROMPTS = [tuple(range(40, 60)), (7,), tuple(range(90, 125))]
RANKS = {"four": 4, "sixteen": 16, "three": 3}
# peft 0.21.2 reads an attribute that transformers 5.24 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def write_adapters(folder: Path) -> None:
    model = tiny_llama()
    for seed, (name, rank) in enumerate(RANKS.items()):
        Files(shapes_of(model), seed=seed, r=rank, size=0.5).write(folder / name)


def answers(
    folder: Path,
    names: Iterable[str | None],
    record: Record | None,
    device: str = "cpu",
    n_tokens: int = N_TOKENS,
) -> dict[tuple[str | None, tuple[int, ...]], str]:
    """What is answered to each prompt by the base (None) and by each adapter, all at once.

    The base has answered before: adapters move the memory of what was recorded for it.
    """
    model: Any = tiny_llama()
    model.to(device)
    engine = BatchingEngine(model, decode_bytes, [], limits=Limits(max_running=32), record=record)
    sampling = Sampling(n_tokens, temperature=0, ignore_eos=True)
    collect(submit(engine, Request(PROMPTS[0], sampling)))
    leases = {name: engine.load(name, folder / name) for name in names if name is not None}
    streams = {
        (name, prompt): submit(engine, Request(prompt, sampling, lease=leases.get(name or "")))
        for prompt in PROMPTS
        for name in names
    }
    found = {key: collect(stream)[0] for key, stream in streams.items()}
    engine.close()
    return found


class Recorder:
    """Keeps each pass as it is, and checks what a graph relies on: that no memory has moved."""

    def __init__(self) -> None:
        self.n_records = self.n_plays = 0

    def __call__(self, step: Pass, numbers: torch.Tensor) -> Pass:
        self.n_records += 1
        shape, places = numbers.shape, self._places(step)

        def play(numbers: torch.Tensor) -> torch.Tensor:
            self.n_plays += 1
            assert numbers.shape == shape
            assert self._places(step) == places
            return step(numbers)

        return play

    @staticmethod
    def _places(step: Any) -> list[int]:
        """The addresses of all memory that the pass reads or writes and that outlives it."""
        graphs = next(
            c.cell_contents for c in step.__closure__ if hasattr(c.cell_contents, "_rows")
        )
        tensors = [t for each in graphs._rows._layers for t in (each.keys, each.values)]
        for buffers in graphs._slots.layers.values():
            tensors += [t for t in (buffers.a, buffers.b) if t is not None]
        return [tensor.data_ptr() for tensor in tensors]


def test_recorded_steps_answer_as_others_do_whatever_the_mix(tmp_path: Path) -> None:
    write_adapters(tmp_path)
    names = [None, *RANKS]
    recorder = Recorder()
    expected = answers(tmp_path, names, None)
    assert answers(tmp_path, names, recorder) == expected
    assert len(set(expected.values())) == len(expected), "the adapters are idle"
    # All rows of a few counts, each recorded once and played for many steps.
    assert 0 < recorder.n_records < recorder.n_plays / 2


def test_steps_are_recorded_again_where_memory_has_moved(tmp_path: Path) -> None:
    """A longer answer moves the cache, a wider adapter the columns: the recorder would notice."""
    write_adapters(tmp_path)
    model = tiny_llama()
    Files(shapes_of(model), seed=9, r=64, size=0.5).write(tmp_path / "wide")
    names, n_tokens = [None, *RANKS, "wide"], 260
    recorder = Recorder()
    assert answers(tmp_path, names, recorder, n_tokens=n_tokens) == answers(
        tmp_path, names, None, n_tokens=n_tokens
    )
    assert recorder.n_records >= 2


def test_an_adapter_that_does_more_than_add_a_product_takes_a_pass_of_its_own(
    tmp_path: Path,
) -> None:
    write_adapters(tmp_path)
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    random_adapter(copy.deepcopy(tiny_llama()), config, tmp_path / "ia3", seed=5)
    names = ["ia3", "four"]
    recorder = Recorder()
    assert answers(tmp_path, names, recorder) == answers(tmp_path, names, None)
    n_alone = N_TOKENS - 1
    assert recorder.n_plays == n_alone, "only those of the base, before the adapters came"


def test_a_model_that_cannot_be_recorded_decodes_all_the_same_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapters(tmp_path)
    tries = []

    def record(step: Pass, numbers: torch.Tensor) -> Pass:
        tries.append(numbers)
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        found = answers(tmp_path, [None, "four"], record)
    assert found == answers(tmp_path, [None, "four"], None)
    assert len(tries) == 1
    assert "cannot be recorded" in caplog.text


def test_rows_are_rounded_to_few_counts() -> None:
    assert [_rounded(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 33)] == [
        *(1, 2, 3, 4, 6, 6, 8, 12, 16, 24, 32, 48)
    ]


@pytest.mark.gpu
def test_graphs_on_a_gpu_answer_what_kernels_told_one_by_one_answer(tmp_path: Path) -> None:
    write_adapters(tmp_path)
    names = [None, *RANKS]
    expected = answers(tmp_path, names, None, "cuda")
    assert answers(tmp_path, names, CudaRecord("cuda"), "cuda") == expected
    assert expected == answers(tmp_path, names, None)
