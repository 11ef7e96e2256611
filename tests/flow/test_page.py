"""The page against the whole service: a newcomer's way from the sample data to two answers."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.flow.conftest import Up

TRAINED = 240_000
"""Milliseconds that two epochs on the sample may take."""


@pytest.fixture
def page(up: Up, browser: Browser) -> Iterator[Page]:
    context = browser.new_context(base_url=up.url)
    context.set_default_timeout(20_000)
    made = context.new_page()
    made.goto("/ui/")
    made.get_by_label("API key").fill(up.key)
    made.get_by_role("button", name="Log in").click()
    made.wait_for_url("**/ui/jobs")
    yield made
    context.close()


def test_from_the_sample_data_to_two_answers_side_by_side(page: Page) -> None:
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto("/ui/datasets")
    sample = page.get_by_role("button", name="Use the sample data set")
    if sample.count() == 0:  # other tests of this session have uploaded theirs
        page.evaluate("import('./static/x/js/app.js').then(each => each.useSample())")
    else:
        sample.click()
    page.wait_for_url("**/ui/jobs/new?file=*")
    page.locator('[data-field="suffix"]').fill("page")
    page.locator('[data-field="hyperparameters.n_epochs"]').fill("2")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/ui/jobs/ftjob-"))
    status = page.locator("#status .status")
    expect(status).to_have_attribute("data-status", "running", timeout=TRAINED)
    expect(page.locator("#mark")).to_have_attribute("data-state", "open")
    expect(status).to_have_attribute("data-status", "succeeded", timeout=TRAINED)
    steps = page.locator("#step").get_attribute("data-last-step")
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", steps or "")
    page.locator("#try").click()
    page.wait_for_url("**/ui/playground?*")
    page.get_by_label("Message").fill("Boat 3: The water is too shallow here.")
    page.keyboard.press("Enter")
    base, tuned = page.locator(".pane").nth(0), page.locator(".pane").nth(1)
    expect(base.locator("[data-facts]")).to_contain_text("tokens", timeout=90_000)
    expect(tuned.locator("[data-facts]")).to_contain_text("ft:smollm2-135m-instruct:local:page:")
    answers = [each.locator(".turn.assistant").inner_text() for each in (base, tuned)]
    assert answers[0] != answers[1]
    assert "Ticket" in answers[1]
    assert faults == []
