"""The heap of large tensors: whole again after each pass, and nothing is ever given out twice."""

import gc
import mmap
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.kernels.memory import CHUNK_BYTES
from worker.training.packed import pool
from worker.training.packed.pool import SMALLEST_BYTES, Pool

FLOAT = torch.empty(0)
MEBI = 1 << 20


def bytes_of(made: Pool, n_bytes: int) -> torch.Tensor:
    return made.empty(torch.empty(0, dtype=torch.uint8), n_bytes)


def test_memory_serves_the_next_tensor_once_the_last_view_is_gone() -> None:
    made = Pool()
    first = made.empty(FLOAT, 4, 256, 1024)
    place, view = first.data_ptr(), first[1:, :5]
    del first
    other = made.empty(FLOAT, 4, 256, 1024)
    assert other.data_ptr() != place
    del view
    assert made.empty(FLOAT, 2, 256, 1024).data_ptr() == place


def test_what_a_graph_keeps_for_its_backward_pass_is_not_given_out() -> None:
    made = Pool()
    x = made.copy(torch.full((1 << 20,), 3.0)).requires_grad_()
    y = x * x  # keeps x
    del x
    made.copy(torch.zeros(1 << 20))
    (gradient,) = torch.autograd.grad(y.sum(), y.grad_fn.next_functions[0][0].variable)  # type: ignore[union-attr]
    assert bool((gradient == 6.0).all())


def test_writing_to_one_tensor_is_no_change_of_another() -> None:
    made = Pool()
    kept, other = (made.copy(torch.ones(1 << 16)) for _ in range(2))
    weight = torch.ones(1 << 16, requires_grad=True)
    y = weight * kept
    other.mul_(2)
    y.sum().backward()  # torch would refuse if it took `kept` for changed
    assert weight.grad is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(SMALLEST_BYTES, 24 * MEBI), st.integers(0, 9), st.booleans()),
        max_size=30,
    )
)
def test_living_tensors_never_overlap_and_a_pass_leaves_the_heap_whole(
    steps: list[tuple[int, int, bool]],
) -> None:
    made = Pool()
    living: list[torch.Tensor] = []
    for n_bytes, victim, gives_back in steps:
        if gives_back and living:
            del living[victim % len(living)]
        else:
            living.append(bytes_of(made, n_bytes))
        spans = sorted((each.data_ptr(), each.data_ptr() + each.nbytes) for each in living)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all(start % 64 == 0 for start, _ in spans)
    living.clear()
    n_chunks = len(made._chunks)
    whole = [bytes_of(made, CHUNK_BYTES) for _ in range(n_chunks)]
    assert len({each.data_ptr() for each in whole}) == len(made._chunks) == n_chunks


def test_no_more_is_mapped_for_later_passes_of_any_lengths() -> None:
    made = Pool()

    def run(n_tokens: int) -> None:
        kept = [made.empty(FLOAT, n_tokens, 3072) for _ in range(20)]
        for _ in range(20):
            made.empty(FLOAT, n_tokens, 1536)
        del kept

    run(1024)
    n_chunks = len(made._chunks)
    for n_tokens in (300, 1000, 517, 1024, 64):
        run(n_tokens)
    assert len(made._chunks) == n_chunks


@pytest.mark.parametrize("n_bytes", [0, 64, SMALLEST_BYTES - 1, CHUNK_BYTES + 1])
def test_small_and_huge_tensors_are_left_to_torch(n_bytes: int) -> None:
    made = Pool()
    assert bytes_of(made, n_bytes).shape == (n_bytes,)
    assert made._chunks == []


def test_tensors_of_other_devices_are_left_to_torch() -> None:
    made = Pool()
    like = torch.empty(0, device="meta", dtype=torch.float16)
    found = made.empty(like, 1024, 1024)
    assert (found.device.type, found.dtype, made._chunks) == ("meta", torch.float16, [])


def test_a_copy_has_the_numbers_and_a_cast_of_the_same_dtype_is_no_copy() -> None:
    x = torch.randn(300, 400).t()
    assert torch.equal(pool.copy(x), x)
    assert pool.copy(x).is_contiguous()
    assert torch.equal(pool.copy(x, torch.bfloat16), x.bfloat16())
    assert pool.cast(x, torch.float32) is x
    assert torch.equal(pool.cast(x, torch.bfloat16), x.bfloat16())


def test_releasing_gives_up_what_is_free_and_nothing_that_lives() -> None:
    made = Pool()
    living = made.copy(torch.arange(1 << 20))
    passing = [bytes_of(made, CHUNK_BYTES) for _ in range(3)]
    assert len(made._chunks) == 4
    del passing
    made.release()
    assert len(made._chunks) == 1
    bytes_of(made, CHUNK_BYTES)
    assert torch.equal(living, torch.arange(1 << 20))
    del living
    gc.collect()
    made.release()
    assert made._chunks == []


def test_memory_that_the_system_refuses_is_a_memory_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="can't map 67,108,864 bytes"):
        Pool().empty(FLOAT, 1 << 20)
