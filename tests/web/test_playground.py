"""The playground, with a server of answers that says what a test tells it to say."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect

from models.domain.generation import Chunk
from models.registry import inference_servers
from models.registry.inference_servers import Announcement
from tests.api.fake_inference import FINISHED, STARTED, FakeInference, Hold, running_fake
from tests.web.site import ADAPTER, HOSTILE, Site


@pytest.fixture
def inference(site: Site) -> Iterator[FakeInference]:
    """A server of the base and of an adapter on it."""
    job_id = site.job()
    site.start(job_id)
    site.finish(job_id)
    site.publish(job_id, ADAPTER)
    with running_fake() as fake:
        with site.database.write() as session:
            announcement = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, announcement, 600)
        yield fake


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_each_pane_shows_the_answer_and_who_gave_it(
    site: Site, page: Page, inference: FakeInference
) -> None:
    page.goto("/ui/playground")
    ask(page, "Hello?")
    for pane, model in zip(page.locator(".pane").all(), ("base", ADAPTER), strict=True):
        expect(pane.locator(".turn.assistant")).to_have_text("Hello")
        expect(pane).to_have_attribute("data-model", model)
        expect(pane.locator("[data-facts]")).to_contain_text("2 tokens")
    asked = {each.adapter and each.adapter.name for each in inference.requests}
    assert asked == {None, ADAPTER}
    assert site.faults == []


def test_a_hostile_answer_is_text(site: Site, page: Page, inference: FakeInference) -> None:
    inference.events = [STARTED, Chunk(text=HOSTILE, finish_reason="stop"), FINISHED]
    page.on("dialog", lambda dialog: site.faults.append(dialog.message))
    page.goto("/ui/playground")
    ask(page, HOSTILE)
    for pane in page.locator(".pane").all():
        expect(pane.locator(".turn.assistant")).to_have_text(HOSTILE)
        expect(pane.locator(".turn.user")).to_have_text(HOSTILE)
    assert page.locator(".answers script, .answers img").count() == 0
    page.reload()  # the conversation comes back from the tab's storage
    expect(page.locator(".turn.assistant").first).to_have_text(HOSTILE)
    assert page.locator(".answers script, .answers img").count() == 0
    assert "owned" not in page.title()
    assert site.faults == []


@pytest.mark.parametrize("how", ["button", "key"])
def test_stop_ends_both_answers_at_the_server_too(
    site: Site, page: Page, inference: FakeInference, how: str
) -> None:
    inference.events = [STARTED, Chunk(text="So far"), Hold()]
    page.goto("/ui/playground")
    ask(page, "Tell me everything.")
    for pane in page.locator(".pane").all():
        expect(pane.locator(".turn.assistant")).to_have_text("So far")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    for pane in page.locator(".pane").all():
        expect(pane.locator("[data-facts]")).to_contain_text("stopped")
        expect(pane.locator(".turn.assistant")).to_have_text("So far")
    assert inference.left.wait(20)
    assert site.faults == []
