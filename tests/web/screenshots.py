"""Pictures of every page, of real runs: ``make screenshots`` puts them into ``screenshots/``.

A whole service trains SmolLM2 on the example data; that takes some minutes without a GPU.
"""

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openai import OpenAI
from playwright.sync_api import Browser, Page, expect, sync_playwright

from models.settings import ModelSettings
from tests.browser import chromium
from tests.flow.conftest import Up, first_rows, run_up, wait_until

FOLDER = Path(__file__).parents[2] / "screenshots"
CACHE = Path("~/.cache/tunery-tests/base-models").expanduser()
BASE = "smollm2-135m-instruct"
WIDE = {"width": 1280, "height": 900}
KINDS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": WIDE},
    "dark": {"color_scheme": "dark", "viewport": WIDE},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
}
N_ROWS = 20
PATIENCE = 1200
"""Seconds that a job may take; `wait_until` gives slow processors three times as long."""
SLOW = 900_000
QUESTION = "Hello. A dog has been barking on a boat for hours. It cannot wait!"
Prepare = Callable[[Page], None]


@dataclass
class Studio:
    """A running service, its windows, and what was photographed so far."""

    up: Up
    client: OpenAI
    windows: dict[str, Page] = field(default_factory=dict)
    n_taken: int = 0
    slowest_paint: float = 0.0

    def open(self, browser: Browser) -> None:
        """Open a logged-in window of each kind."""
        for kind, options in KINDS.items():
            page = browser.new_context(base_url=self.up.url, **options).new_page()
            page.set_default_timeout(60_000)
            page.goto("/ui/login")
            self.take(page, "login", kind)
            page.get_by_label("API key").fill(self.up.key)
            page.get_by_role("button", name="Log in").click()
            page.wait_for_url("**/ui/jobs")
            self.windows[kind] = page

    def take(self, page: Page, name: str, kind: str) -> None:
        height = page.evaluate("document.documentElement.scrollHeight")
        size = KINDS[kind]["viewport"]
        # As high as the page, so that the menu beside it reaches to its end.
        page.set_viewport_size(size | {"height": max(size["height"], height)})
        page.screenshot(path=FOLDER / f"{name}-{kind}.png")
        page.set_viewport_size(size)
        paints = (
            "performance.getEntriesByName('first-contentful-paint').map(each => each.startTime)"
        )
        self.slowest_paint = max(self.slowest_paint, *page.evaluate(paints), 0.0)
        self.n_taken += 1

    def show(self, name: str, path: str, prepare: Prepare | None = None) -> None:
        """Take a picture of a page in every window, once `prepare` has used its controls."""
        for kind, page in self.windows.items():
            page.goto(path)
            page.wait_for_timeout(700)
            if prepare is not None:
                prepare(page)
            self.take(page, name, kind)

    def job(self, suffix: str, file: str, rate: float, batch_size: int = 1, **changes: Any) -> str:
        """Start a job of many small steps, judged on rows that are held out."""
        hyperparameters = {"n_epochs": 1, "batch_size": batch_size}
        body = {
            "method": {
                "type": "supervised",
                "supervised": {"hyperparameters": hyperparameters},
            },
            "validation_split": 0.1,
            "optimizer": {"type": "adamw", "learning_rate": rate},
            **changes,
        }
        job = self.client.fine_tuning.jobs.create(
            model=BASE,
            training_file=file,
            suffix=suffix,
            extra_body=body,
        )
        return job.id

    def wait(self, job_id: str, wanted: Callable[[Any], bool]) -> str:
        """Wait until a job is as wanted; return the name of its result, if it has one."""
        retrieve = self.client.fine_tuning.jobs.retrieve
        wait_until(lambda: wanted(retrieve(job_id)), PATIENCE, f"job {job_id}")
        return retrieve(job_id).fine_tuned_model or ""


def ended(job: Any) -> bool:
    return job.status in ("succeeded", "failed", "cancelled")


def ask_checkpoint(page: Page) -> None:
    page.locator("#sample-ask").click()
    expect(page.locator("#sample-ask")).to_be_enabled(timeout=SLOW)


def ask_both(page: Page) -> None:
    page.locator("#max-tokens").evaluate("field => { field.value = '60'; }")
    page.get_by_label("Message").fill(QUESTION)
    page.keyboard.press("Enter")
    for pane in page.locator(".pane").all():
        expect(pane.locator("[data-facts]")).to_contain_text("tokens", timeout=SLOW)


def see_preview(page: Page) -> None:
    expect(page.locator("#histogram")).to_have_attribute(
        "data-bins", re.compile(r"\d"), timeout=SLOW
    )


def see_estimate(page: Page) -> None:
    expect(page.locator("#estimate")).to_have_attribute(
        "data-peak", re.compile(r"\d"), timeout=SLOW
    )
    expect(page.locator("#fits")).to_have_attribute("data-fits", "true", timeout=SLOW)


def take_all(studio: Studio, folder: Path) -> None:
    """Train, and take every page at the time when it has most to show."""
    studio.show("welcome", "/ui/jobs")
    files = studio.client.files
    good = files.create(file=first_rows(folder / "harbour-desk.jsonl", N_ROWS), purpose="fine-tune")
    lines = (folder / "harbour-desk.jsonl").read_bytes().splitlines()
    lines[2], lines[10], lines[17] = b'{"messages": [{"role": "user"}]}', b"{", lines[4]
    (folder / "night-watch.jsonl").write_bytes(b"\n".join(lines))
    faulty = files.create(file=folder / "night-watch.jsonl", purpose="fine-tune")
    for file in (good, faulty):
        files.wait_for_processing(file.id)
    first = studio.job("harbour-desk", good.id, 1e-3)
    second = studio.job("careful", good.id, 2e-4, batch_size=4, peft={"type": "lora", "r": 8})
    failed = studio.job("too-long", good.id, 1e-3, max_seq_length=32)
    studio.wait(first, lambda job: job.model_extra["step"] >= N_ROWS // 3)
    for path in ("jobs", "workers"):
        studio.show(path, f"/ui/{path}")
    studio.show("job-running", f"/ui/jobs/{first}")
    name = studio.wait(first, ended)
    for each in (second, failed):
        studio.wait(each, ended)
    studio.show("job-done", f"/ui/jobs/{first}", ask_checkpoint)
    studio.show("job-failed", f"/ui/jobs/{failed}")
    studio.show("compare", f"/ui/compare?ids={first},{second}", ask_checkpoint)
    studio.show("datasets", "/ui/datasets")
    studio.show("dataset", f"/ui/datasets/{faulty.id}", see_preview)
    studio.show("new-job", f"/ui/jobs/new?file={good.id}", see_estimate)
    studio.show("models", "/ui/models")
    studio.show("model", f"/ui/models/{name}")
    studio.show("playground", f"/ui/playground?left={BASE}&right={name}", ask_both)
    for path in ("keys", "usage", "settings", "nothing"):
        studio.show(path, f"/ui/{path}")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        cache = CACHE if CACHE.is_dir() else ModelSettings().cache_dir
        with run_up(Path(folder) / "home", cache) as up:
            browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
            studio = Studio(up, up.client())
            studio.open(browser)
            take_all(studio, Path(folder))
            browser.close()
    sys.stdout.write(
        f"{studio.n_taken} pictures in {FOLDER.name}/; the slowest first paint took "
        f"{studio.slowest_paint:.0f} ms\n"
    )


if __name__ == "__main__":
    main()
