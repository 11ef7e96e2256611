"""A database with the schema and one base model, on SQLite and on PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.cli.migrate import upgrade
from models.db import Database
from models.registry import base_models
from models.settings import DatabaseSettings


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'tunery.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    upgrade(url)
    made = Database(DatabaseSettings(url=url))
    with made.write() as session:
        base_models.sync_catalog(session, {"base": "path:/nowhere"})
    yield made
    made.close()
