"""Writes that wait at the same time share a transaction, and nothing else."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from api.group_commit import GroupCommit
from models.db import Database, Outcome
from models.registry import tenancy
from models.tables import Project

who: contextvars.ContextVar[str] = contextvars.ContextVar("who")


def create(name: str) -> Callable[[Session], str]:
    def write(session: Session) -> str:
        tenancy.create_project(session, name)
        if name.startswith("bad"):
            raise ValueError(name)
        return name

    return write


def names(database: Database) -> set[str]:
    with database.read() as session:
        return set(session.scalars(select(Project.name)))


class Counting(Database):
    """Counts transactions of several writes; each waits until it is let go."""

    gate = threading.Event()
    sizes: list[int]

    def write_together(self, writes: list[Callable[[Session], object]]) -> list[Outcome[Any]]:  # type: ignore[override]
        self.gate.wait(10)
        self.sizes.append(len(writes))
        return super().write_together(writes)


@pytest.fixture
def counting(database: Database) -> Counting:
    if not database.is_embedded:
        pytest.skip("a server commits in groups by itself")
    database.__class__ = Counting
    assert isinstance(database, Counting)
    database.sizes = []
    return database


def test_each_gets_its_own_result_or_error_and_the_good_ones_are_kept(
    database: Database,
) -> None:
    async def main() -> None:
        writer = GroupCommit(database)
        wanted = [f"{kind} {n}" for n in range(20) for kind in ("good", "bad")]
        found = await asyncio.gather(
            *(writer.run(create(name)) for name in wanted), return_exceptions=True
        )
        for name, outcome in zip(wanted, found, strict=True):
            if name.startswith("bad"):
                assert isinstance(outcome, ValueError)
                assert outcome.args == (name,)
            else:
                assert outcome == name
        assert {name for name in names(database) if name[:3] in ("goo", "bad")} == {
            name for name in wanted if name.startswith("good")
        }
        writer.close()

    asyncio.run(main())


def test_what_waits_while_one_is_written_is_written_in_one_transaction(
    counting: Counting,
) -> None:
    async def main() -> None:
        counting.gate.clear()
        writer = GroupCommit(counting)
        tasks = [asyncio.create_task(writer.run(create("team 0")))]
        await asyncio.sleep(0.01)
        tasks += [asyncio.create_task(writer.run(create(f"team {n}"))) for n in range(1, 5)]
        await asyncio.sleep(0)
        counting.gate.set()
        await asyncio.gather(*tasks)
        assert counting.sizes == [1, 4]
        writer.close()

    asyncio.run(main())


def test_a_write_whose_caller_went_away_is_kept_and_the_next_one_works(
    database: Database,
) -> None:
    async def main() -> None:
        writer = GroupCommit(database)
        gone = asyncio.create_task(writer.run(create("gone")))
        await asyncio.sleep(0)
        gone.cancel()
        assert await writer.run(create("stays")) == "stays"
        writer.close()
        assert {"gone", "stays"} <= names(database)

    asyncio.run(main())


def test_a_commit_that_fails_is_told_to_everyone(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        if not database.is_embedded:
            pytest.skip("there each has a transaction of its own")

        def fail(_: object) -> list[Outcome[Any]]:
            raise OSError("disk full")

        writer = GroupCommit(database)
        with monkeypatch.context() as patch:
            patch.setattr(database, "write_together", fail)
            found = await asyncio.gather(
                writer.run(create("a")), writer.run(create("b")), return_exceptions=True
            )
        assert [str(error) for error in found] == ["disk full"] * 2
        assert await writer.run(create("c")) == "c"
        writer.close()

    asyncio.run(main())


def test_a_write_has_the_context_of_its_request(database: Database) -> None:
    async def main() -> None:
        writer = GroupCommit(database)

        async def ask(name: str) -> str:
            who.set(name)
            return await writer.run(lambda _: who.get())

        assert tuple(await asyncio.gather(ask("one"), ask("two"))) == ("one", "two")
        writer.close()

    asyncio.run(main())


def test_writes_of_a_kind_are_one_call_and_each_has_its_outcome(database: Database) -> None:
    calls: list[int] = []

    def make(session: Session, wanted: Sequence[str]) -> list[Outcome[str]]:
        calls.append(len(wanted))
        good = [name for name in wanted if not name.startswith("bad")]
        for name in good:
            tenancy.create_project(session, name)
        if "poison" in wanted:
            raise OSError("poison")
        return [Outcome(n) if n in good else Outcome(error=ValueError(n)) for n in wanted]

    async def main() -> None:
        writer = GroupCommit(database)
        for wanted in (["a", "bad", "b"], ["c", "poison", "d"]):
            found = await asyncio.gather(
                *(writer.join(make, name) for name in wanted), return_exceptions=True
            )
            assert [str(each) for each in found] == wanted
            assert isinstance(found[1], ValueError | OSError)
        writer.close()

    asyncio.run(main())
    assert set("abcd") == names(database) & {*"abcd", "bad", "poison"}
    assert sorted(calls) == ([1, 1, 1, 3, 3] if database.is_embedded else [1] * 6)


def test_clients_that_write_one_after_the_other_share_their_transactions(
    counting: Counting,
) -> None:
    async def main() -> None:
        counting.gate.set()
        writer = GroupCommit(counting)

        async def client(name: str) -> None:
            for n in range(10):
                await writer.run(create(f"{name} {n}"))

        await asyncio.gather(*(client(f"client {n}") for n in range(4)))
        assert sum(counting.sizes) == 40
        assert counting.sizes.count(4) >= 7  # but for the first, and where one was late
        await client("alone")
        assert counting.sizes[-9:] == [1] * 9
        assert len([name for name in names(counting) if name.startswith("client")]) == 40
        writer.close()

    asyncio.run(main())
