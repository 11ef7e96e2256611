"""Coroutines that are begun without a task."""

import asyncio
from collections.abc import Awaitable

import pytest

from api.eager import begin


async def wait_for(event: asyncio.Event, done: list[str], name: str) -> None:
    await event.wait()
    await asyncio.sleep(0)
    done.append(name)


def test_what_has_nothing_to_wait_for_ends_at_once() -> None:
    async def main() -> list[str]:
        event = asyncio.Event()
        event.set()
        done: list[str] = []

        async def at_once() -> None:
            await event.wait()
            done.append("at once")

        assert begin(at_once()) is None
        return done

    assert asyncio.run(main()) == ["at once"]


def test_the_rest_is_awaited_by_a_task() -> None:
    async def main() -> list[str]:
        event = asyncio.Event()
        done: list[str] = []
        rest = begin(wait_for(event, done, "later"))
        assert rest is not None
        assert done == []
        asyncio.get_running_loop().call_later(0.01, event.set)
        await rest
        return done

    assert asyncio.run(main()) == ["later"]


def test_an_error_comes_at_once_or_with_the_rest() -> None:
    async def fail(before: Awaitable[None]) -> None:
        await before
        raise OSError("gone")

    async def main() -> None:
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        ready.set_result(None)
        with pytest.raises(OSError, match="gone"):
            begin(fail(ready))
        rest = begin(fail(asyncio.sleep(0)))
        assert rest is not None
        with pytest.raises(OSError, match="gone"):
            await rest

    asyncio.run(main())


def test_a_task_that_is_cancelled_closes_what_it_awaits() -> None:
    async def main() -> list[str]:
        done: list[str] = []

        async def work() -> None:
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                done.append("closed")

        rest = begin(work())
        assert rest is not None
        waiter = asyncio.ensure_future(rest)
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.wait([waiter])
        return done

    assert asyncio.run(main()) == ["closed"]
