"""An API that has an inference server for its base model."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.registry import inference_servers
from models.registry.inference_servers import Announcement
from tests.api.fake_inference import FakeInference, running_fake


@pytest.fixture
def inference(client: TestClient, database: Database) -> Iterator[FakeInference]:
    """The server that `client` is served by; `client` is asked for so that "base" exists."""
    with running_fake() as fake:
        with database.write() as session:
            announcement = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, announcement, 60)
        yield fake
