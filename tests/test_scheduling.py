"""The order in which two workers run the suite."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.scheduling import LONGEST, ROOT, UP, WEB, piece_of, pytest_collection_modifyitems


def test_files_that_use_one_service_are_one_piece() -> None:
    using = ["test_openai_sdk", "test_hot_swap", "test_estimate", "test_readme", "test_page"]
    assert {piece_of(f"tests/flow/{name}.py") for name in using} == {UP}
    assert {piece_of(f"tests/web/{name}.py") for name in ("test_jobs", "test_pages")} == {WEB}
    assert piece_of("tests/flow/test_recovery.py") == "tests/flow/test_recovery.py"


def test_the_longest_pieces_are_there() -> None:
    assert [each for each in LONGEST if each != UP and not (ROOT / each).exists()] == []


@pytest.mark.parametrize("in_worker", [True, False])
def test_workers_begin_with_the_longest_and_keep_pieces_whole(in_worker: bool) -> None:
    ids = [
        "tests/api/test_key_cache.py::a",
        "tests/flow/test_page.py::a",
        "tests/flow/test_recovery.py::a",
        "tests/flow/test_up.py::a[x::y]",
        "tests/models/test_db.py::a",
        "tests/models/test_db.py::b",
    ]
    items: Any = [SimpleNamespace(nodeid=each) for each in ids]
    config: Any = SimpleNamespace(**({"workerinput": {}} if in_worker else {}))
    pytest_collection_modifyitems(config, items)
    order = [1, 3, 2, 4, 5, 0] if in_worker else range(6)
    assert [item.nodeid for item in items] == [ids[index] for index in order]
