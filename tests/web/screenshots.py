"""Pictures of every page: ``make screenshots`` puts them into ``screenshots/``."""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from api.cli.migrate import upgrade
from tests.browser import chromium
from tests.web.conftest import Site, open_context, rows, running_site
from tests.web.test_pages import everything, upload

FOLDER = Path(__file__).parents[2] / "screenshots"
KINDS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 900}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 900}},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}


def take(site: Site) -> int:
    """Take all pictures; return how many."""
    FOLDER.mkdir(exist_ok=True)
    n_taken = 0
    paths = everything(site)
    lines = rows(24).split(b"\n")
    lines[2] = b'{"messages": [{"role": "user"}]}'
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = open_context(browser, site)
        paths = ["/ui/login", *paths, upload(site, context, b"\n".join(lines))]
        for kind, options in KINDS.items():
            context = open_context(browser, site, **options)
            for number, path in enumerate(paths):
                page = context.new_page()
                page.goto(path)
                page.wait_for_timeout(700)
                name = path.removeprefix("/ui/").partition("?")[0].partition("/")[0]
                page.screenshot(path=FOLDER / f"{number:02}-{name}-{kind}.png", full_page=True)
                page.close()
                n_taken += 1
        browser.close()
    return n_taken


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        upgrade(f"sqlite:///{Path(folder) / 'tunery.db'}")
        with running_site(Path(folder)) as site:
            sys.stdout.write(f"{take(site)} pictures in {FOLDER.name}/\n")


if __name__ == "__main__":
    main()
