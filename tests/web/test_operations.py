"""Keys and workers."""

import time

from playwright.sync_api import BrowserContext, Page, expect

from models.registry import workers
from tests.web.site import Site


def test_a_key_is_shown_once_works_and_is_revoked(
    site: Site, page: Page, context: BrowserContext
) -> None:
    page.goto("/ui/keys")
    page.get_by_label("Name of a new key").fill("laptop")
    page.get_by_label("Ends").select_option("30")
    page.get_by_role("button", name="Make a key").click()
    secret = page.locator("#secret-value")
    expect(secret).to_contain_text("sk-tunery-")
    headers = {"authorization": f"Bearer {secret.inner_text()}"}
    assert context.request.get("/v1/models", headers=headers).status == 200
    value = secret.inner_text()
    page.reload()
    assert value not in page.content()
    row = page.get_by_role("row", name="laptop")
    last_day = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 30 * 86400 - 60))
    assert row.get_by_role("cell").nth(4).inner_text() >= last_day
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke the key").click()
    expect(page.get_by_role("row", name="laptop")).to_contain_text("revoked")
    assert context.request.get("/v1/models", headers=headers).status == 401


def test_a_worker_is_drained_and_resumed_and_seen_to_fall_silent(site: Site, page: Page) -> None:
    site.announce_worker(8 * 10**9)
    page.goto("/ui/workers")
    worker = page.locator('[data-worker="worker"].card')
    drain = page.get_by_role("button", name="Drain desk-1")
    drain.focus()
    page.keyboard.press("Enter")
    expect(worker).to_have_attribute("data-status", "draining")
    with site.database.read() as session:
        assert workers.is_draining(session, workers.slot_owner("worker", 0))
    page.get_by_role("button", name="Take jobs again on desk-1").click()
    expect(worker).to_have_attribute("data-status", "online")
    site.announce_worker(8 * 10**9, seconds=-1)
    expect(worker).to_have_attribute("data-status", "offline")
    assert site.faults == []
