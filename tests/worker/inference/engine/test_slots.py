"""Slots: every row sees its own adapter, and a slot in use keeps what it holds."""

import pytest
import torch

from worker.inference.engine.columns import GRAIN
from worker.inference.engine.params import ModuleShape
from worker.inference.engine.slots import Slots
from worker.inference.engine.weights import AdapterWeights, Bottleneck, ModuleChange
from worker.kernels import tiles

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


def compiled(n_slots: int, dtype: torch.dtype = torch.float32) -> Slots:
    return Slots(SHAPES, n_slots, torch.empty(0), dtype)


def test_compiled_loops_are_told_where_each_row_has_its_matrices_and_nothing_is_copied() -> None:
    slots = compiled(2, torch.bfloat16)
    one, two = (slots.prepare(each) for each in (low_rank("1", 1, 1.0), low_rank("2", 4, 2.0)))
    slots.use([two, None, one, two])
    assert slots.places is not None
    assert slots.places.shape == (4, len(SHAPES), 3)
    a, b = two.modules["x"].a, two.modules["x"].b
    assert a is not None
    assert b is not None
    assert a.dtype == b.dtype == torch.bfloat16
    assert b.T.is_contiguous()
    assert slots.places[0].tolist() == [[a.data_ptr(), b.data_ptr(), 4], [0, 0, 0]]
    assert slots.places[1].tolist() == [[0, 0, 0]] * 2
    assert slots.places[2, 0, 2] == 1
    assert (slots.places[3] == slots.places[0]).all()
    assert slots.is_touched == [True, False]
    assert slots.layers["x"].a is None


@pytest.mark.skipif(not tiles.is_supported(), reason="this processor has no AVX512-BF16")
def test_matrices_that_tiles_read_lie_as_they_read_them_and_one_behind_the_other() -> None:
    shapes = {"x": ModuleShape(4, 2), "odd": ModuleShape(3, 2)}
    slots = Slots(shapes, 2, torch.empty(0), torch.bfloat16)
    changes = {
        path: ModuleChange(torch.ones(3, shape.in_features), torch.ones(2, 3))
        for path, shape in shapes.items()
    }
    adapter = slots.prepare(AdapterWeights("1", changes))
    x, odd = adapter.modules["x"], adapter.modules["odd"]
    assert adapter.adds_only
    assert (x.rank, odd.rank) == (3, 3)
    assert x.low_rank is not None
    assert x.a is None
    assert odd.low_rank is None
    assert adapter.n_bytes == sum(each.nbytes for each in (x.low_rank.a, x.low_rank.b)) + 2 * 15
    slots.use([adapter, None])
    assert slots.places is not None
    assert tuple(slots.places[0, 0]) == x.low_rank.place
    inputs = {
        path: torch.ones(2, 1, shape.in_features).bfloat16() for path, shape in shapes.items()
    }
    for path, expected in (("x", 12.0), ("odd", 9.0)):
        y = torch.zeros(2, 1, 2).bfloat16()
        slots.add_([(y, path)], inputs[path])
        assert y.tolist() == [[[expected] * 2], [[0.0] * 2]]


@pytest.mark.parametrize("compiled", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.3, 3.0])
def test_b_is_scaled_in_float32_and_then_rounded_whichever_way_it_lies(
    scale: float, compiled: torch.dtype | None
) -> None:
    shapes = {"x": ModuleShape(6, 50), "odd": ModuleShape(5, 50)}
    dtype = compiled or torch.float32
    slots = Slots(shapes, 1, torch.empty(0), compiled)
    b = torch.randn(50, 3)
    found = []
    for way in (b, b.T.contiguous().T, b.repeat(1, 2)[:, :3]):
        changes = {
            path: ModuleChange(torch.ones(3, shape.in_features), way, scale)
            for path, shape in shapes.items()
        }
        adapter = slots.prepare(AdapterWeights("1", changes))
        for change in adapter.modules.values():
            assert change.scale == 1
            assert change.b is None or torch.equal(change.b, (b * scale).to(dtype))
        found.append(adapter.modules["x"].tensors()["b"])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_weights_whose_scale_is_not_in_them_are_refused() -> None:
    change = ModuleChange(torch.ones(1, 3), torch.ones(2, 1), 2.0)
    with pytest.raises(ValueError, match="yet to be multiplied"):
        make(1).use([AdapterWeights("1", {"x": change})])


def test_places_are_those_of_the_weights_given_whatever_had_their_digest_before() -> None:
    slots = compiled(1)
    for _ in range(2):
        adapter = slots.prepare(low_rank("1", 2))
        slots.use([adapter])
        a = adapter.modules["x"].a
        assert a is not None
        assert slots.places is not None
        assert slots.places[0, 0, 0] == a.data_ptr()


def test_compiled_slots_refuse_weights_that_were_not_prepared() -> None:
    with pytest.raises(ValueError, match="was not prepared"):
        compiled(1).use([low_rank("1", 1)])


def test_what_is_more_than_low_rank_is_copied_and_gone_with_its_adapter() -> None:
    slots = compiled(1)
    change = ModuleChange(torch.ones(1, 3), torch.ones(2, 1), gain=torch.tensor([2.0, 3.0]))
    slots.use([slots.prepare(AdapterWeights("1", {"x": change}))])
    assert not slots.adds_only
    layer = slots.layers["x"]
    assert layer.vectors["gain"].tolist() == [[2, 3], [1, 1]]
    assert layer.a is None
    slots.use([slots.prepare(low_rank("2", 1))])
    assert bool(slots.adds_only)
    assert layer.users["gain"] == set()
    assert layer.vectors["gain"].tolist() == [[1, 1]] * 2


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


def test_matrices_of_low_rank_have_a_dtype_of_their_own() -> None:
    down, up = ((torch.ones(2, 2), torch.ones(2)) for _ in range(2))
    bottleneck = Bottleneck(*down, *up, activation="relu")
    low = low_rank("1", 2).modules["x"]
    adapter = AdapterWeights("1", {"x": low, "y": ModuleChange(bottlenecks={"p": bottleneck})})
    cast = adapter.cast(torch.float32, torch.bfloat16)
    assert {each.dtype for each in cast.modules["x"].tensors().values()} == {torch.bfloat16}
    assert {each.dtype for each in cast.modules["y"].tensors().values()} == {torch.float32}
    assert cast.n_bytes == 2 * (2 * 3 + 2 * 2) + 4 * 2 * (4 + 2)
    assert adapter.cast(torch.float32).n_bytes == adapter.n_bytes
