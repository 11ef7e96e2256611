"""A browser, and one service for all tests of the page, which each of them finds new."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser import running_browser
from tests.web.site import VIOLATION, Site, open_context, running_site

expect.set_options(timeout=20_000)  # slow processors are no failure


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    with running_browser() as made:
        yield made


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(migrated_sqlite, folder / "tunery.db")
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
