"""News of jobs: nothing is left out or told twice, however many read and whenever they come."""

import asyncio
from typing import Any

import pytest

from api import feed as module
from api.feed import JobFeed, News, Position
from models.db import Database
from models.domain.reports import StepMetrics
from models.registry import events, job_runs, metrics


def write(database: Database, job_id: str, *steps: int) -> None:
    points = [
        StepMetrics(
            step=step,
            epoch=1.0,
            train_loss=1.0,
            train_mean_token_accuracy=0.5,
            learning_rate=0.1,
            grad_norm=1.0,
            tokens=1,
            trained_tokens=1,
            tokens_per_second=1.0,
        )
        for step in steps
    ]
    with database.write() as session:
        job_runs.fence(session, job_id, 1, step=steps[-1])
        metrics.record(session, job_id, 1, points, 100)


def end(database: Database, job_id: str) -> None:
    with database.write() as session:
        job_runs.succeed(session, job_id, 1, fine_tuned_model="ft:x")


async def collect(feed: JobFeed, job_id: str, position: Position) -> list[News]:
    found: list[News] = []

    async def send(news: News) -> None:
        found.append(news)

    await feed.follow(job_id, position, send)
    return found


def steps_of(news: list[News]) -> list[int]:
    return [point["step"] for each in news for point in each.metrics]


def test_readers_that_come_at_any_time_see_every_step_once(
    database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)

    async def main() -> list[list[News]]:
        feed = JobFeed(database, "local")
        write(database, job_id, 1, 2)
        readers = [asyncio.create_task(collect(feed, job_id, Position()))]
        for step in range(3, 30):
            await asyncio.to_thread(write, database, job_id, step)
            if step % 5 == 0:
                position = Position(step=step - 3)
                readers.append(asyncio.create_task(collect(feed, job_id, position)))
            await asyncio.sleep(0.01)
        await asyncio.to_thread(end, database, job_id)
        found = await asyncio.wait_for(asyncio.gather(*readers), 20)
        await feed.aclose()
        return found

    first, *others = asyncio.run(main())
    assert steps_of(first) == list(range(1, 30))
    for at, other in enumerate(others):
        assert steps_of(other) == list(range(5 * (at + 1) - 2, 30))
    for reader in (first, *others):
        assert reader[-1].has_ended
        assert reader[-1].job is not None
        assert reader[-1].job["status"] == "succeeded"


def test_events_come_once_and_in_order(
    database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)

    def say(text: str) -> None:
        with database.write() as session:
            events.append(session, job_id, text)

    async def main() -> list[News]:
        feed = JobFeed(database, "local")
        reader = asyncio.create_task(collect(feed, job_id, Position()))
        for number in range(10):
            await asyncio.to_thread(say, f"number {number}")
            await asyncio.sleep(0.01)
        await asyncio.to_thread(end, database, job_id)
        return await asyncio.wait_for(reader, 20)

    told = [event for news in asyncio.run(main()) for event in news.events]
    sequences = [event["sequence"] for event in told]
    assert sequences == sorted(set(sequences))
    texts = [event["message"] for event in told if event["message"].startswith("number")]
    assert texts == [f"number {number}" for number in range(10)]


def test_a_reader_who_leaves_is_forgotten(database: Database, job_id: str) -> None:
    async def main() -> dict[str, Any]:
        feed = JobFeed(database, "local")
        came = asyncio.Event()

        async def send(news: News) -> None:
            came.set()

        reader = asyncio.create_task(feed.follow(job_id, Position(), send))
        await asyncio.wait_for(came.wait(), 20)
        assert feed._watched
        reader.cancel()
        await asyncio.wait([reader])
        assert feed._task is not None
        await asyncio.wait_for(feed._task, 20)
        return feed._watched

    assert asyncio.run(main()) == {}


def test_a_slow_reader_waits_alone_and_ends_when_too_much_waits(
    database: Database, job_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first send after the history waits, as for a client that does not read."""
    monkeypatch.setattr(module, "MAX_WAITING", 3)

    async def main() -> tuple[list[int], list[int]]:
        feed = JobFeed(database, "local")
        told: list[News] = []
        may_go_on = asyncio.Event()

        async def send(news: News) -> None:
            if told:
                await may_go_on.wait()
            told.append(news)

        slow = asyncio.create_task(feed.follow(job_id, Position(), send))
        quick: list[News] = []

        async def note(news: News) -> None:
            quick.append(news)

        other = asyncio.create_task(feed.follow(job_id, Position(), note))
        async with asyncio.timeout(20):
            while not (told and quick):  # the history, of which no step may be part
                await asyncio.sleep(0.002)
        for step in range(1, 9):
            await asyncio.to_thread(write, database, job_id, step)
            async with asyncio.timeout(20):
                while steps_of(quick) != list(range(1, step + 1)):
                    await asyncio.sleep(0.002)
        assert steps_of(told) == []
        may_go_on.set()
        await asyncio.wait_for(slow, 20)
        other.cancel()
        await asyncio.wait([other])
        await feed.aclose()
        return steps_of(told), steps_of(quick)

    slow, quick = asyncio.run(main())
    # One was being sent, two waited, and in place of the third it was told that it ends.
    assert slow == [1, 2, 3]
    assert quick == list(range(1, 9))


def test_what_sending_raises_ends_the_stream(database: Database, job_id: str) -> None:
    async def main() -> None:
        feed = JobFeed(database, "local")
        n_sent = 0

        async def send(news: News) -> None:
            nonlocal n_sent
            n_sent += 1
            if n_sent > 1:
                raise OSError("gone")

        reader = asyncio.create_task(feed.follow(job_id, Position(), send))
        async with asyncio.timeout(20):
            while not n_sent:
                await asyncio.sleep(0.002)
        await asyncio.to_thread(write, database, job_id, 1)
        with pytest.raises(OSError, match="gone"):
            await asyncio.wait_for(reader, 20)
        assert feed.n_readers == 0
        await feed.aclose()

    asyncio.run(main())


def test_a_position_is_written_and_read() -> None:
    assert Position.parse(str(Position(3, 7, 2))) == Position(3, 7, 2)
    assert Position.parse("12") == Position(12)
    with pytest.raises(ValueError, match="invalid literal"):
        Position.parse("x")
