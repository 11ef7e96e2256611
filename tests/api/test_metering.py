"""What is served is counted once, also when an answer breaks off or the database is away."""

import asyncio
from collections.abc import AsyncGenerator

from api.metering import Meter
from models.db import Database
from models.domain.generation import Chunk, Finished, GenerateEvent, Started
from models.registry import tenancy, usage
from models.registry.usage import Used, User
from models.settings import DatabaseSettings


async def answer(n_pieces: int, finished: bool) -> AsyncGenerator[GenerateEvent, None]:
    yield Started(prompt_tokens=5, system_fingerprint="fp")
    for _ in range(n_pieces):
        yield Chunk(text="x")
    if finished:
        yield Finished(prompt_tokens=5, completion_tokens=4)


def test_an_answer_counts_whole_or_as_far_as_it_got(database: Database) -> None:
    with database.write() as session:
        user = User(tenancy.default_project(session).id, "key_a", "base")
    spent: list[tuple[User, Used]] = []
    meter = Meter(database, spent.extend)

    async def read(finished: bool, n_read: int) -> None:
        stream = meter.watch(user, answer(3, finished))
        for _ in range(n_read):
            await anext(stream)
        await stream.aclose()

    asyncio.run(read(True, 5))
    assert meter.pending(user.project_id) == 9
    asyncio.run(read(False, 3))  # broken off after two pieces
    asyncio.run(read(False, 0))  # refused before it began: nothing was used
    meter.close()
    assert meter.pending(user.project_id) == 0
    with database.read() as session:
        total = usage.total(session, user.project_id, usage.today(session))
    assert total == Used(requests=2, prompt_tokens=10, completion_tokens=6)
    assert [(each, used.tokens) for each, used in spent] == [(user, 16)]


def test_what_a_silent_database_does_not_take_is_kept(database: Database) -> None:
    with database.write() as session:
        user = User(tenancy.default_project(session).id, "key_a", "base")
    spent: list[tuple[User, Used]] = []
    nowhere = Database(DatabaseSettings(url="sqlite:////nowhere/tunery.db"))
    meter = Meter(nowhere, spent.extend)
    meter.count(user, Used(requests=1, prompt_tokens=3))
    meter.flush()
    assert (meter.pending(user.project_id), spent) == (3, [])
    meter._database = database
    meter.close()
    nowhere.close()
    with database.read() as session:
        assert usage.total(session, user.project_id, 0).prompt_tokens == 3
