"""The command line on a service of its own."""

from collections.abc import Callable, Iterator

import pytest
from rich.console import Console
from typer.testing import CliRunner

from api.cli import common
from api.cli.commands import app
from models.db import Database
from models.registry import tenancy
from models.settings import Settings
from tests.api.fake_inference import serving
from tests.apps import app_for

Tunery = Callable[..., str]


@pytest.fixture
def tunery(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Tunery]:
    """Run ``tunery ARGUMENTS`` and return what it prints; `status` is its exit status."""
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "cli")
    monkeypatch.setattr(common.console, "_width", 250)
    assert isinstance(common.console, Console)
    with serving(app_for(settings), lifespan="on") as url:
        monkeypatch.setenv("TUNERY_DATABASE__URL", settings.database.url)
        monkeypatch.setenv("TUNERY_CLIENT__URL", url)
        monkeypatch.setenv("TUNERY_CLIENT__API_KEY", secret)

        def run(*arguments: str, status: int = 0) -> str:
            result = CliRunner().invoke(app, list(arguments))
            assert result.exit_code == status, result.output
            return result.output

        yield run
