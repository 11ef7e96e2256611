"""A model's page: where it came from, and what came of it."""

from playwright.sync_api import Page, expect

from models.registry import adapters
from tests.web.site import ADAPTER, TOTAL_STEPS, Site, rows


def test_a_models_page_leads_to_what_it_came_from_and_what_came_of_it(
    site: Site, page: Page
) -> None:
    data = site.upload(rows(20)).rpartition("/")[2]
    first = site.job(training_file=data)
    site.start(first)
    site.steps(first, 1, TOTAL_STEPS)
    site.finish(first)
    site.publish(first, ADAPTER)
    with site.database.read() as session:
        start = adapters.resolve(session, site.status(first).project_id, ADAPTER).adapter
    second = site.job("further", init_adapter=start, training_file=data)
    page.goto("/ui/models")
    page.get_by_role("link", name=ADAPTER).click()
    page.wait_for_url(f"**/ui/models/{ADAPTER.replace(':', '*')}")
    expect(page.locator(".lineage li")).to_have_count(2)
    for link, path in (
        (page.locator(".lineage").get_by_role("link", name="rows.jsonl"), f"/ui/datasets/{data}"),
        (page.locator(".lineage").get_by_role("link", name=first), f"/ui/jobs/{first}"),
        (page.locator("#successors").get_by_role("link", name=second), f"/ui/jobs/{second}"),
        (page.locator(".lineage").get_by_role("link", name="base"), "/ui/models#base"),
    ):
        link.click()
        page.wait_for_url(f"**{path}")
        page.go_back()
        expect(page.locator(".lineage")).to_be_visible()
    page.goto(f"/ui/jobs/{second}")
    page.get_by_role("link", name=ADAPTER).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(ADAPTER)
    page.get_by_role("button", name="Serve merged").click()
    expect(page.locator("#answered")).to_have_text("by a merged copy of its base")
    page.get_by_role("button", name="Serve in the batch").click()
    expect(page.locator("#answered")).to_have_text("unmerged")
    # Without an inference server the data set has no preview on this site.
    assert [each for each in site.faults if "503" not in each] == []
