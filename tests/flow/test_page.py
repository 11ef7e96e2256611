"""The page against the whole service: a newcomer's way from the sample data to two answers."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.flow.conftest import Up, first_rows
from worker.base_models import load_tokenizer

TRAINED = 600_000
"""Milliseconds that one epoch on the sample may take at most; two free cores take half a minute."""
SHORT = {
    "hyperparameters.n_epochs": "1",
    "hyperparameters.batch_size": "2",
    "optimizer.learning_rate": "0.002",
}


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
    # The form's own fields make it short: every row once, in quick steps.
    for field, value in SHORT.items():
        page.locator(f'[data-field="{field}"]').fill(value)
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/ui/jobs/ftjob-"))
    status = page.locator("#status .status")
    expect(status).to_have_attribute("data-status", "running", timeout=TRAINED)
    expect(page.locator("#mark")).to_have_attribute("data-state", "open")
    expect(status).to_have_attribute("data-status", "succeeded", timeout=TRAINED)
    steps = page.locator("#step").get_attribute("data-last-step")
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", steps or "")
    samples = page.locator("#samples")
    expect(samples).to_have_attribute("data-rows", "8")
    page.locator("#sample-ask").click()
    asked = page.locator("#sample-tuned")
    expect(asked.locator("[data-facts]")).to_contain_text(f"ckpt-step-{steps}", timeout=90_000)
    expect(asked.locator("[data-answer]")).to_contain_text("Ticket")
    expect(page.locator("#sample-wanted")).to_contain_text("Ticket")
    page.locator("#try").click()
    page.wait_for_url("**/ui/playground?*")
    page.locator("#options summary").click()
    page.get_by_label("System prompt").fill("You are the harbour desk.")  # as in the sample
    page.get_by_label("Message").fill("Boat 3: The water is too shallow here.")
    page.keyboard.press("Enter")
    base, tuned = page.locator(".pane").nth(0), page.locator(".pane").nth(1)
    expect(base.locator("[data-facts]")).to_contain_text("tokens", timeout=90_000)
    name = "ft:smollm2-135m-instruct:local:page:"
    expect(tuned.locator("[data-facts]")).to_contain_text(name, timeout=90_000)
    answers = [each.locator(".turn.assistant").inner_text() for each in (base, tuned)]
    assert answers[0] != answers[1]
    assert "Ticket" in answers[1]
    page.get_by_label("Message").fill("Tell me a long story about a boat.")
    page.keyboard.press("Enter")
    last = base.locator(".turn.assistant").nth(1)
    expect(last).not_to_be_empty(timeout=90_000)
    first = last.inner_text()
    expect(last).not_to_have_text(first)
    stop = page.get_by_role("button", name="Stop")
    stop.click()
    expect(stop).to_be_hidden()
    expect(base.locator("[data-facts]")).to_contain_text("stopped")
    kept = last.inner_text()
    page.wait_for_timeout(500)
    assert last.inner_text() == kept
    assert faults == []


def test_the_slider_counts_the_rows_that_would_be_cut(
    up: Up, page: Page, smollm2: tuple[Path, object], tmp_path: Path
) -> None:
    data = first_rows(tmp_path / "rows.jsonl", 40)
    file = up.client().files.create(file=data, purpose="fine-tune")
    up.client().files.wait_for_processing(file.id)
    tokenizer = load_tokenizer(smollm2[0])
    lengths = []
    for line in data.read_text().splitlines():
        text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    lengths.sort()
    page.goto(f"/ui/datasets/{file.id}")
    counted = page.locator("#statistics")
    expect(counted).to_have_attribute("data-overlong", "0", timeout=90_000)
    expect(page.locator("#histogram")).to_have_attribute("data-bins", "40")
    for limit in (lengths[10], lengths[30]):
        page.locator("#max-length-slider").fill(str(limit))
        expected = sum(length > limit for length in lengths)
        expect(counted).to_have_attribute("data-overlong", str(expected))
        expect(page.locator("#max-length")).to_have_value(str(limit))
