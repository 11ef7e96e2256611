"""Coroutines that mostly have nothing to wait for, begun without a task.

asyncio has eager tasks for that from Python 3.12 on; this does the same for 3.11, and takes no task
at all where a coroutine ends at its first step.
"""

import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any


def begin(coroutine: Coroutine[Any, Any, None]) -> Awaitable[None] | None:
    """Run a coroutine until it ends or waits for something.

    The coroutine must not ask which task it runs in before it waits: it has none of its own.

    Returns:
        None when it has ended, else what is left of it, to be awaited once by some task.

    Raises:
        BaseException: what the coroutine raises.
    """
    try:
        waits_for = coroutine.send(None)
    except StopIteration:
        return None
    return _rest(coroutine, waits_for)


@types.coroutine
def _rest(coroutine: Coroutine[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    try:
        yield waits_for
    except BaseException:
        coroutine.close()
        raise
    yield from coroutine.__await__()
