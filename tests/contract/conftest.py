"""The service on either database, with a broker that nobody runs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from api.cli.migrate import upgrade
from models.db import Database
from models.settings import DatabaseSettings, Settings


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path / 'tunery.db'}"
    else:
        url = request.getfixturevalue("postgres_url")
    upgrade(url)
    return Settings.model_validate(
        {
            "database": DatabaseSettings(url=url),
            "broker": {"url": f"redis+socket://{tmp_path / 'nobody.sock'}"},
            "storage": {"url": f"file:{tmp_path / 'objects'}"},
            "inference": {"token": "secret-between-servers"},
            "models": {"catalog": {"base": "path:/nowhere"}},
        }
    )


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    made = Database(settings.database)
    yield made
    made.close()
