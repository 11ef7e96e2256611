"""Requests made from the OpenAPI document: no server error, no status that it does not name."""

import pytest

from models.settings import Settings
from tests.contract import fuzzing


@pytest.mark.parametrize("settings", ["postgresql"], indirect=True)
def test_no_request_of_the_document_is_answered_by_surprise(settings: Settings) -> None:
    with fuzzing.service(settings) as target:
        assert fuzzing.fuzz(target, n_examples=3, first_seed=1) == []
