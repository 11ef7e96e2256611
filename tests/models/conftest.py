"""A database with the schema and one base model, on SQLite and on PostgreSQL."""

from collections.abc import Iterator

import pytest

from models.db import Database
from models.registry import base_models
from models.settings import DatabaseSettings
from tests.services import MigratedUrl


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, migrated_url: MigratedUrl) -> Iterator[Database]:
    url = migrated_url(request.param)
    made = Database(DatabaseSettings(url=url))
    with made.write() as session:
        base_models.sync_catalog(session, {"base": "path:/nowhere"})
    yield made
    made.close()
