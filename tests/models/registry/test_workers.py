"""Workers are listed while they say that they live."""

import pytest

from models.db import Database
from models.domain.machine import Device, Machine
from models.errors import NotFoundError
from models.registry import workers

CPU = Device(type="cpu", index=0, name="CPU", memory_total=8, memory_used=3)
MACHINE = Machine(devices=(CPU,), memory_total=8, memory_available=5, memory_used=2)


def announce(database: Database, worker_id: str, ttl_seconds: float, slots: int = 1) -> None:
    about = workers.Announcement(worker_id, "host", 7, "1", slots, MACHINE)
    with database.write() as session:
        workers.announce(session, about, ttl_seconds)


def alive(database: Database) -> list[tuple[str, int]]:
    with database.read() as session:
        return [(worker.id, worker.slots) for worker in workers.alive(session)]


def test_a_worker_is_listed_until_its_time_is_over_or_it_says_goodbye(database: Database) -> None:
    announce(database, "a", 60)
    announce(database, "gone", -1)
    assert alive(database) == [("a", 1)]
    with database.read() as session:
        assert [worker.id for worker in workers.lost(session)] == ["gone"]
    announce(database, "a", 60, slots=2)
    announce(database, "b", 60)
    assert alive(database) == [("a", 2), ("b", 1)]
    with database.write() as session:
        workers.withdraw(session, "a")
    assert alive(database) == [("b", 1)]


def test_a_worker_drains_until_it_is_told_otherwise(database: Database) -> None:
    announce(database, "host:a", 60, slots=2)
    owner = workers.slot_owner("host:a", 1)
    for draining in (True, False):
        with database.write() as session:
            workers.set_draining(session, "host:a", draining)
        announce(database, "host:a", 60, slots=2)  # what it says of itself changes nothing
        with database.read() as session:
            assert workers.is_draining(session, owner) == draining
    announce(database, "gone", -1)
    with database.write() as session, pytest.raises(NotFoundError, match="gone"):
        workers.set_draining(session, "gone", True)
