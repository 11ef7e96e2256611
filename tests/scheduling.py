"""Which worker of pytest-xdist runs what, and when; ``tests/conftest.py`` loads this as a plug-in.

Files stay whole, as with ``--dist loadfile``, with two differences that save minutes:

- all files that use the service of ``up`` are one piece of work, and so are those of the page, so
  that each service (and the browser) is started once and not once by every worker;
- the longest pieces come first, so that no worker is left alone with one of them at the end.
"""

from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
UP = "tests/flow: up"
WEB = "tests/web/"
LONGEST = [
    UP,
    "tests/flow/test_recovery.py",
    WEB,
    "tests/worker/training/test_run.py",
    "tests/worker/inference/test_process.py",
    "tests/worker/training/test_cost.py",
    "tests/worker/training/test_followers.py",
]
"""Pieces of half a minute and more, longest first: most start processes that load torch."""


@cache
def piece_of(file: str) -> str:
    """Return the piece of work that a file of tests, named from the root, belongs to."""
    if file.startswith(WEB):
        return WEB
    return UP if "up: Up" in (ROOT / file).read_text() else file


class Scheduling(LoadScopeScheduling):
    """Deals out the pieces in the order of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        return piece_of(nodeid.split("::", 1)[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling | None:
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # by number of tests, which says little about seconds
    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In the workers of pytest-xdist: the longest pieces first, then those of the most tests."""
    if not hasattr(config, "workerinput"):
        return
    pieces: dict[str, list[pytest.Item]] = {}
    for item in items:
        pieces.setdefault(piece_of(item.nodeid.split("::", 1)[0]), []).append(item)
    ranks = {piece: rank for rank, piece in enumerate(LONGEST)}
    order = sorted(pieces, key=lambda each: (ranks.get(each, len(ranks)), -len(pieces[each])))
    items[:] = [item for piece in order for item in pieces[piece]]
