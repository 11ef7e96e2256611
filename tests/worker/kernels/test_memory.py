"""Tensors side by side in memory of the system's, until all of them are gone."""

import gc
import mmap

import pytest
import torch

from worker.kernels import memory
from worker.kernels.memory import ALIGNMENT, CHUNK_BYTES, Shelf, mapped


def test_tensors_are_aligned_and_lie_apart() -> None:
    shelf = Shelf()
    tensors = [shelf.empty((3, size), torch.bfloat16) for size in (1, 40, 7, 1000)]
    for number, tensor in enumerate(tensors):
        assert tensor.data_ptr() % ALIGNMENT == 0
        tensor.fill_(number)
    assert [set(tensor.flatten().tolist()) for tensor in tensors] == [{0.0}, {1.0}, {2.0}, {3.0}]
    assert tensors[3].shape == (3, 1000)
    assert tensors[1].data_ptr() - tensors[0].data_ptr() == ALIGNMENT


def test_one_larger_than_a_chunk_has_its_own() -> None:
    shelf = Shelf()
    first = shelf.empty((8,), torch.float32)
    large = shelf.empty((CHUNK_BYTES + 1,), torch.int8)
    large[-1] = first[0] = 5
    assert large[-1] == first[0] == 5


def test_a_chunk_is_the_systems_again_when_its_tensors_are_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks: list[mmap.mmap] = []

    def spy(n_bytes: int) -> mmap.mmap:
        chunks.append(mapped(n_bytes))
        return chunks[-1]

    monkeypatch.setattr(memory, "mapped", spy)
    shelf = Shelf()
    kept = shelf.empty((4,), torch.float32)
    shelf.empty((CHUNK_BYTES // 4,), torch.float32)
    assert len(chunks) == 2
    gc.collect()
    with pytest.raises(BufferError):
        chunks[0].close()  # in use
    del kept
    gc.collect()
    chunks[0].close()


def test_memory_that_the_system_does_not_have_is_an_error() -> None:
    with pytest.raises(MemoryError, match="can't map"):
        mapped(1 << 60)
