"""A browser, and one service for all tests of the page, which each of them finds new."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from api.cli.migrate import upgrade
from tests.web.site import VIOLATION, Site, open_context, running_site

expect.set_options(timeout=20_000)  # slow processors are no failure


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database with the schema; each service copies it, which is much faster."""
    path = tmp_path_factory.mktemp("migrated") / "tunery.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(migrated_database, folder / "tunery.db")
    with running_site(folder) as made:
        yield made


@pytest.fixture
def site(service: Site) -> Site:
    service.clear()
    return service


@pytest.fixture
def context(browser: Browser, site: Site) -> Iterator[BrowserContext]:
    """A logged-in window; whatever a test does in it keeps to the policy of the page."""
    made = open_context(browser, site)
    yield made
    made.close()
    assert not [each for each in site.faults if VIOLATION in each]


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()
