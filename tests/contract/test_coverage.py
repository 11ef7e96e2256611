"""The table of the SDK's methods is complete, true of the tests, and in the documents."""

import inspect
from pathlib import Path

from tests.contract import coverage, test_background, test_contract

MODULES = (test_contract, test_background)


def test_every_method_of_the_sdk_is_in_the_table_once() -> None:
    named = [*coverage.SERVED, *coverage.NOT_SERVED]
    assert len(named) == len(set(named))
    assert set(named) == coverage.sdk_methods()


def test_each_served_method_is_called_by_the_test_that_the_table_names() -> None:
    for method, test in coverage.SERVED.items():
        [found] = [getattr(module, test) for module in MODULES if hasattr(module, test)]
        assert f'"{method}"' in inspect.getsource(found), method


def test_the_document_is_the_table() -> None:
    path = Path(__file__).parents[2] / "docs" / "openai-compatibility.md"
    assert path.read_text() == coverage.document()
