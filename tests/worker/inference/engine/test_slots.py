"""Slots: every row sees its own adapter, and a slot in use keeps what it holds."""

import pytest
import torch

from worker.inference.engine.columns import GRAIN
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import AdapterWeights, ModuleChange

SHAPES = {"x": ModuleShape(3, 2), "y": ModuleShape(3, 2)}


def low_rank(digest: str, rank: int, value: float = 1.0) -> AdapterWeights:
    change = ModuleChange(torch.full((rank, 3), value), torch.full((2, rank), value))
    return AdapterWeights(digest, {"x": change})


def make(n_slots: int) -> Slots:
    return Slots(SHAPES, n_slots, torch.empty(0))


def own_columns(slots: Slots, row: int) -> list[float]:
    """The first input's column of A, of the columns that are the row's own."""
    a = slots.layers["x"].a
    assert a is not None
    seen = a[slots.low_rank.span, 0]
    return (seen if slots.low_rank.mask is None else seen[slots.low_rank.mask[row]]).tolist()


def test_adapters_of_any_rank_stand_side_by_side_and_each_row_sees_its_own() -> None:
    slots = make(3)
    one, two = low_rank("1", 1, 1.0), low_rank("2", 4, 2.0)
    slots.use([two, None, one])
    assert own_columns(slots, 0) == [2.0] * 4
    assert own_columns(slots, 1) == []
    assert own_columns(slots, 2) == [1.0]
    gain = AdapterWeights("3", {"x": ModuleChange(gain=torch.ones(2))})
    slots.use([two, gain])
    slots.use([gain])
    assert own_columns(slots, 0) == []


def test_rows_of_one_adapter_of_low_rank_need_no_copy_until_others_come() -> None:
    slots = make(2)
    one, two = low_rank("1", 1, 1.0), low_rank("2", 4, 2.0)
    slots.use([one, one])
    [(rows, pairs)] = slots.parts or []
    assert rows == slice(0, 2)
    assert pairs["x"][1].tolist() == [[[1.0, 1.0]]]
    assert slots.digests() == ["1"]
    assert slots.layers["x"].a is None
    assert slots.active == frozenset()  # norms and layers are the base's
    slots.use([one, None])
    assert bool(slots.parts is None)
    assert own_columns(slots, 0) == [1.0]
    slots.use([two, one])
    assert bool(slots.parts is None)
    assert own_columns(slots, 0) == [2.0] * 4
    slots.use([None])
    assert bool(slots.parts is None)


def test_prompts_take_the_matrices_of_each_row_where_all_adapters_are_of_low_rank() -> None:
    slots = make(3)
    one, two = low_rank("1", 1, 1.0), low_rank("2", 4, 2.0)
    one, two = one.cast(torch.float32, torch.bfloat16), two.cast(torch.float32, torch.bfloat16)
    slots.use([one, one, None, two], n_tokens=2)
    assert slots.parts == [(slice(0, 2), one.prompt_pairs), (slice(3, 4), two.prompt_pairs)]
    assert slots.layers["x"].a is None, "there is no copy"
    slots.use([one, AdapterWeights("3", {"x": ModuleChange(gain=torch.ones(2))})], n_tokens=2)
    assert bool(slots.parts is None)
    assert own_columns(slots, 0) == [1.0]


def test_a_slot_given_to_another_is_filled_with_it_when_others_come() -> None:
    slots = make(1)
    slots.use([low_rank("1", 2, 1.0), None])
    three = low_rank("3", 2, 3.0)
    slots.use([three])
    assert own_columns(slots, 0) == []
    slots.use([three, None])
    assert own_columns(slots, 0) == [3.0] * 2


def test_what_is_more_than_low_rank_is_copied_at_once() -> None:
    slots = make(1)
    low, gain = torch.ones(1, 3), torch.ones(2)
    slots.use([AdapterWeights("1", {"x": ModuleChange(low, torch.ones(2, 1), gain=gain)})])
    assert bool(slots.parts is None)
    assert own_columns(slots, 0) == [1.0]


def test_only_the_columns_of_the_pass_are_looked_at() -> None:
    slots = make(3)
    slots.use([low_rank("1", 2), low_rank("2", 3), low_rank("3", 4)])
    slots.use([low_rank("3", 4), None])
    assert slots.low_rank.span == slice(8, 12)
    slots.use([None])
    assert not slots.active


def test_the_slot_used_least_recently_goes_and_never_a_busy_one() -> None:
    slots = make(2)
    slots.use([low_rank("1", 2), low_rank("2", 2)])
    slots.use([low_rank("1", 2)])
    slots.use([low_rank("3", 2)])
    assert sorted(slots.digests()) == ["1", "3"]
    slots.busy = {"1", "3"}
    with pytest.raises(ValueError, match="All 2 adapter slots"):
        slots.use([low_rank("4", 2)])
    slots.busy = {"3", None}
    slots.use([low_rank("4", 2)])
    assert sorted(slots.digests()) == ["3", "4"]


def test_more_adapters_than_slots_in_one_pass_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="All 1 adapter slots"):
        make(1).use([low_rank("1", 1), low_rank("2", 1)])


def test_a_smaller_adapter_leaves_nothing_of_the_one_before() -> None:
    slots = make(1)
    slots.use([low_rank("1", 4, float("inf")), None])
    second = AdapterWeights("2", {"y": ModuleChange(torch.ones(2, 3), torch.ones(2, 2))})
    slots.use([second, None])
    x, y = slots.layers["x"], slots.layers["y"]
    assert x.low_rank == set()
    assert x.a is not None
    assert x.a[slots.low_rank.span].tolist() == [[0.0] * 3] * 2
    assert y.a is not None
    assert y.a[slots.low_rank.span].tolist() == [[1.0] * 3] * 2


def test_buffers_grow_and_keep_what_they_hold() -> None:
    slots = make(3)
    first, second = low_rank("1", 3, 1.0), low_rank("2", GRAIN, 2.0)
    slots.use([first])
    slots.use([first, second])
    assert own_columns(slots, 0) == [1.0] * 3
    assert own_columns(slots, 1) == [2.0] * GRAIN
    assert slots.layers["y"].a is None


def test_a_gap_is_filled_before_buffers_grow() -> None:
    slots = make(3)
    slots.use([low_rank("1", 20), low_rank("2", 12)])
    slots.busy = {"2"}
    slots.use([low_rank("3", 10), None])
    slots.busy = {"2", "3"}
    slots.use([low_rank("4", 10, 4.0), low_rank("2", 12)])
    assert own_columns(slots, 0) == [4.0] * 10
    a = slots.layers["x"].a
    assert a is not None
    assert len(a) == 2 * GRAIN


def test_gains_are_a_rows_own_and_gone_with_their_adapter() -> None:
    slots = make(2)
    slots.use([AdapterWeights("1", {"x": ModuleChange(gain=torch.tensor([2.0, 3.0]))}), None])
    layer = slots.layers["x"]
    assert layer.vectors["gain"][slots.index].tolist() == [[2, 3], [1, 1]]
    for digest in ("2", "3"):
        slots.use([low_rank(digest, 1), None])
    assert layer.users["gain"] == set()
    assert layer.vectors["gain"].tolist() == [[1, 1]] * 3


def test_prompts_may_take_pairs_in_another_dtype_which_take_memory_of_their_own() -> None:
    adapter = low_rank("1", 2, 1.0)
    assert adapter.n_bytes == 4 * (2 * 3 + 2 * 2)
    both = adapter.cast(torch.float32, torch.bfloat16)
    assert both.prompt_pairs is not None
    assert both.prompt_pairs["x"][0].dtype == torch.bfloat16
    assert both.pairs is not None
    assert both.pairs["x"][0].dtype == torch.float32
    assert both.modules["x"].a is adapter.modules["x"].a
    assert both.n_bytes == adapter.n_bytes * 3 // 2
    assert adapter.cast(torch.float32, torch.float32).n_bytes == adapter.n_bytes
