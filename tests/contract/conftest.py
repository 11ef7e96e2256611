"""The service on either database, with a broker that nobody runs."""

import asyncio
from collections.abc import Awaitable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from models.db import Database
from models.registry import inference_servers, tenancy
from models.registry.inference_servers import Announcement
from models.settings import DatabaseSettings, Settings
from tests.api.fake_inference import FakeInference, running_fake, serving
from tests.apps import app_for
from tests.services import MigratedUrl


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, migrated_url: MigratedUrl, tmp_path: Path) -> Settings:
    url = migrated_url(request.param)
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


class Sdk:
    """Calls methods by dotted name, on a client of either kind."""

    def __init__(
        self, client: OpenAI | AsyncOpenAI, runner: asyncio.Runner, fake: FakeInference
    ) -> None:
        self.client = client
        self.fake = fake
        self._runner = runner

    def __call__(self, method: str, /, *args: Any, **values: Any) -> Any:
        result = attrgetter(method)(self.client)(*args, **values)
        return self.wait(result) if isinstance(result, Awaitable) else result

    def wait(self, result: Awaitable[Any]) -> Any:
        async def wait() -> Any:
            return await result

        return self._runner.run(wait())


@pytest.fixture(params=["sync", "async"])
def sdk(request: pytest.FixtureRequest, settings: Settings, database: Database) -> Iterator[Sdk]:
    """A client of a running API with an inference server for "base"."""
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "test")
    with (
        serving(app_for(settings), lifespan="on") as url,
        running_fake() as fake,
        asyncio.Runner() as runner,
    ):
        with database.write() as session:
            server = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, server, 60)
        kind = OpenAI if request.param == "sync" else AsyncOpenAI
        client = kind(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=30)
        made = Sdk(client, runner, fake)
        yield made
        made("close")
