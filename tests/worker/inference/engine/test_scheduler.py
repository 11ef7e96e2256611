"""The scheduler's rules, for every order of events that hypothesis can think of."""

from dataclasses import dataclass
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from worker.inference.engine.scheduler import Limits, Scheduler


@dataclass(eq=False)
class Item:
    """A sequence as counts; it decodes by itself in `work`."""

    name: int
    adapter: str | None = None
    n_tokens: int = 4
    n_left: int = 4
    n_pending: int = 4
    ended: bool = False
    overtaken: int = 0

    def __repr__(self) -> str:
        return f"{self.name}:{self.adapter}"


def work(scheduler: Scheduler[Item]) -> list[Item]:
    """One step of an engine: preempted items start anew, prompts are fed, the rest decodes."""
    preempted, _ = scheduler.next_step()
    for item in preempted:
        item.n_pending = item.n_tokens
    shares = scheduler.shares()
    fed = sum(share for _, share in shares)
    decoding = [item for item in scheduler.running if item.n_pending == 1]
    assert fed + len(decoding) <= max(scheduler.limits.step_tokens, len(decoding) + 1)
    for item, share in shares:
        item.n_pending -= share
    for item in [*decoding, *(item for item, _ in shares if item.n_pending == 0)]:
        item.n_pending = 1
        item.n_tokens += 1
        item.n_left -= 1
        item.ended = item.n_left == 0
    return list(scheduler.running)


def names(items: list[Item]) -> list[int]:
    return [item.name for item in items]


def test_first_come_first_served_up_to_the_places_there_are() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(max_running=2))
    items = [Item(i) for i in range(4)]
    scheduler.add(items)
    assert names(scheduler.next_step()[1]) == [0, 1]
    assert scheduler.next_step() == ([], [])
    items[1].ended = True
    assert names(scheduler.next_step()[1]) == [2]


def test_there_is_room_while_places_and_the_queue_last() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(max_running=1, max_waiting=2))
    assert scheduler.has_room(3)
    assert not scheduler.has_room(4)
    scheduler.add([Item(i) for i in range(3)])
    scheduler.next_step()
    assert not scheduler.has_room(1)


def test_an_adapter_without_a_slot_waits_and_may_be_passed_for_a_while_only() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(n_slots=1, overtake_tokens=16))
    scheduler.add([Item(0, "a"), Item(1, "b"), *(Item(i, "a") for i in range(2, 9)), Item(9)])
    # Each that passes counts the 8 tokens of its prompt and answer: two may.
    assert names(scheduler.next_step()[1]) == [0, 2, 3]
    assert scheduler.next_step() == ([], [])
    for item in scheduler.running:
        item.ended = True
    assert names(scheduler.next_step()[1])[0] == 1


def test_the_base_model_needs_no_slot() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(n_slots=1))
    scheduler.add([Item(0, "a"), Item(1), Item(2)])
    assert names(scheduler.next_step()[1]) == [0, 1, 2]


def test_prompts_share_what_a_step_has_left_in_the_order_they_came() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(step_tokens=10))
    scheduler.add([Item(0, n_pending=1), Item(1, n_pending=6), Item(2, n_pending=9)])
    scheduler.next_step()
    assert [(i.name, share) for i, share in scheduler.shares()] == [(1, 6), (2, 3)]


def test_a_full_step_of_decoding_still_feeds_a_prompt_a_token() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(step_tokens=2))
    scheduler.add([Item(0, n_pending=1), Item(1, n_pending=1), Item(2, n_pending=5)])
    scheduler.next_step()
    assert [share for _, share in scheduler.shares()] == [1]


def test_rows_that_outgrow_the_memory_are_given_up_from_the_last_one_on() -> None:
    scheduler: Scheduler[Item] = Scheduler(Limits(cache_tokens=32, row_growth=8))
    items = [Item(i, n_tokens=8) for i in range(3)]
    scheduler.add(items)
    assert names(scheduler.next_step()[1]) == [0, 1]
    items[0].n_tokens = 17
    assert names(scheduler.next_step()[0]) == [1]
    assert names(list(scheduler.waiting)) == [1, 2]
    items[0].n_tokens = 100
    assert scheduler.next_step() == ([], [])
    assert names(scheduler.running) == [0]


adapters = st.sampled_from([None, "a", "b", "c", "d"])
items = st.builds(
    lambda adapter, n_tokens, n_left: Item(0, adapter, n_tokens, n_left, n_tokens),
    adapters,
    st.integers(1, 40),
    st.integers(1, 30),
)
limits = st.builds(
    Limits,
    max_running=st.integers(1, 4),
    n_slots=st.integers(1, 3),
    step_tokens=st.integers(1, 32),
    cache_tokens=st.integers(8, 160),
    row_growth=st.sampled_from([4, 8]),
    overtake_tokens=st.integers(0, 60),
)


@settings(deadline=None, max_examples=80)
@given(limits, st.lists(st.lists(items, max_size=4), min_size=1, max_size=8), st.data())
def test_the_rules_hold_in_every_order_and_everybody_ends(
    bounds: Limits, arrivals: list[list[Item]], data: Any
) -> None:
    scheduler: Scheduler[Item] = Scheduler(bounds)
    everyone: list[Item] = []
    for step in range(5000):
        if step < len(arrivals):
            for item in arrivals[step]:
                item.name = len(everyone)
                everyone.append(item)
            scheduler.add(arrivals[step])
            if everyone and data.draw(st.booleans()):  # an abort, at any stage
                data.draw(st.sampled_from(everyone)).ended = True
        running = work(scheduler)
        distinct = {item.adapter for item in running} - {None}
        assert len(distinct) <= bounds.n_slots
        assert len(running) <= bounds.max_running
        assert len(set(map(id, [*scheduler.running, *scheduler.waiting]))) == len(
            scheduler.running
        ) + len(scheduler.waiting)
        for item in scheduler.waiting:
            # Whoever passes last may exceed the limit, by itself and no more.
            assert item.overtaken < bounds.overtake_tokens + 70 + 1
        if step >= len(arrivals) and not scheduler.waiting and not running:
            break
    assert all(item.ended for item in everyone)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 64), st.integers(1, 3))
def test_an_adapter_is_not_starved_by_one_that_never_stops_coming(
    overtake: int, n_slots: int
) -> None:
    bounds = Limits(max_running=4, n_slots=n_slots, overtake_tokens=overtake)
    scheduler: Scheduler[Item] = Scheduler(bounds)
    scheduler.add([Item(i, f"busy{i}") for i in range(n_slots)])
    work(scheduler)
    rare = Item(99, "rare")
    scheduler.add([rare])
    for step in range(200):
        scheduler.add([Item(100 + step, f"busy{step % n_slots}")])
        work(scheduler)
        if rare in scheduler.running:
            break
    assert step <= overtake + 8
