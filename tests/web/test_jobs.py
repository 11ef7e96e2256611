"""A job's page while it runs, and the list of jobs."""

import re

from playwright.sync_api import BrowserContext, Page, expect

from models.domain.status import JobStatus
from models.registry import jobs
from tests.web.site import TOTAL_STEPS, Site, rows

TURN = """hidden => {
    Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
    document.dispatchEvent(new Event('visibilitychange'));
}"""


def test_a_job_is_started_and_followed_live(
    site: Site, page: Page, context: BrowserContext
) -> None:
    path = site.upload(rows(40))
    page.goto(f"/ui/jobs/new?file={path.rpartition('/')[2]}")
    page.locator('[data-field="suffix"]').fill("evening")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/ui/jobs/ftjob-"))
    job_id = page.url.rpartition("/")[2]
    with site.database.write() as session:
        jobs.move(session, job_id, JobStatus.QUEUED)
    site.start(job_id)
    expect(page.locator("#status .status")).to_have_attribute("data-status", "running")
    left = []
    for first, last in ((1, 12), (13, 30), (31, 47)):
        site.steps(job_id, first, last)
        expect(page.locator("#step")).to_have_attribute("data-last-step", str(last))
        left.append(page.locator("#eta").get_attribute("data-seconds"))
    assert left[0] == ""  # one look is no pace yet
    expect(page.locator("#eta")).to_have_text(re.compile("^about "))
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", "47")
    expect(page.locator("#loss-chart")).to_have_attribute("data-series", "train,valid")
    assert page.locator("#bar").evaluate("bar => bar.value") == 47
    expect(page).to_have_title(re.compile(r"^39 % evening"))
    expect(page.locator("#mark")).to_have_attribute("data-state", "open")
    site.checkpoint(job_id, 40)
    expect(page.locator('#checkpoints tr[data-step="40"]')).to_be_visible()
    page.reload()
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", "47")
    for first, last in ((48, 60), (61, 110), (111, 118)):
        site.steps(job_id, first, last)
        expect(page.locator("#step")).to_have_attribute("data-last-step", str(last))
    assert float(page.locator("#eta").get_attribute("data-seconds") or "x") < float(left[2] or "x")
    site.steps(job_id, 119, TOTAL_STEPS)
    site.finish(job_id)
    expect(page.locator("#status .status")).to_have_attribute("data-status", "succeeded")
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", str(TOTAL_STEPS))
    expect(page.locator("#mark")).to_have_attribute("data-state", "ended")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    # The form asked for an estimate, and this site has no inference server.
    assert [each for each in site.faults if "503" not in each] == []


def test_a_hidden_page_holds_no_stream_and_misses_nothing(site: Site, page: Page) -> None:
    job_id = site.job()
    site.start(job_id)
    site.steps(job_id, 1, 10)
    page.goto(f"/ui/jobs/{job_id}")
    expect(page.locator("#mark")).to_have_attribute("data-state", "open")
    page.evaluate(TURN, True)
    site.steps(job_id, 11, 30)
    page.wait_for_timeout(1500)
    expect(page.locator("#step")).to_have_attribute("data-last-step", "10")
    page.evaluate(TURN, False)
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", "30")


def test_a_job_is_paused_resumed_and_cancelled_from_its_page(site: Site, page: Page) -> None:
    job_id = site.job()
    page.goto(f"/ui/jobs/{job_id}")
    page.get_by_role("button", name="Pause").click()
    expect(page.locator("#status .status")).to_have_attribute("data-status", "paused")
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#status .status")).to_have_attribute("data-status", "queued")
    page.get_by_role("button", name="Cancel").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("Cancel desk?")
    dialog.get_by_role("button", name="Cancel the job").click()
    expect(page.locator("#status .status")).to_have_attribute("data-status", "cancelled")
    assert site.status(job_id).status == "cancelled"


def test_a_paused_job_stands_still_and_goes_on_from_its_step(site: Site, page: Page) -> None:
    job_id = site.job()
    site.start(job_id)
    site.steps(job_id, 1, 30)
    site.checkpoint(job_id, 30)
    page.goto(f"/ui/jobs/{job_id}")
    step, status = page.locator("#step"), page.locator("#status .status")
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    assert site.status(job_id).pause_requested
    site.release(job_id)
    expect(status).to_have_attribute("data-status", "paused")
    page.get_by_role("button", name="Resume").click()
    expect(status).to_have_attribute("data-status", "queued")
    site.start(job_id)
    expect(status).to_have_attribute("data-status", "running")
    expect(step).to_have_attribute("data-last-step", "30")
    site.steps(job_id, 31, 40, attempt=2)
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", "40")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("dialog")).to_contain_text("Its checkpoints stay usable.")
    page.get_by_role("button", name="Cancel the job").click()
    expect(page.get_by_role("button", name="Cancel", exact=True)).to_be_hidden()
    assert site.status(job_id).cancel_requested
    page.reload()
    expect(page.locator('#checkpoints tr[data-step="30"]')).to_be_visible()


def test_curves_are_drawn_along_steps_or_time(site: Site, page: Page) -> None:
    job_id = site.job()
    site.start(job_id)
    page.goto(f"/ui/jobs/{job_id}")
    expect(page.get_by_label("Along")).to_be_disabled()  # no step yet
    site.steps(job_id, 1, 30)
    chart = page.locator("#loss-chart")
    expect(chart).to_have_attribute("data-points", "30")
    expect(chart.locator(".u-legend .u-series .u-label").first).to_have_text("Step")
    page.get_by_label("Along").select_option("time")
    expect(chart.locator(".u-legend .u-series .u-label").first).to_have_text("Time")
    expect(chart).to_have_attribute("data-last-x", "58")  # two seconds a step
    site.steps(job_id, 31, 32)
    expect(chart).to_have_attribute("data-last-x", "62")
    assert site.faults == []


def test_a_failure_is_shown_with_its_cause(site: Site, page: Page) -> None:
    job_id = site.job()
    site.start(job_id)
    page.goto(f"/ui/jobs/{job_id}")
    site.fail(job_id, "The worker ran out of memory. Lower max_seq_length.")
    expect(page.locator("#failure")).to_contain_text("Lower max_seq_length", timeout=3000)
    expect(page.locator("#status .status")).to_have_attribute("data-status", "failed")
    expect(page.locator("#eta")).to_have_text("–")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    expect(page.locator("#remedies")).to_be_visible()
    page.goto("/ui/jobs")
    expect(page.locator(f'tr[data-job="{job_id}"]')).to_contain_text("out_of_memory")


def test_the_list_shows_a_new_job_without_a_reload(site: Site, page: Page) -> None:
    site.job("first")
    page.goto("/ui/jobs")
    page.evaluate("window.stays = true")
    page.get_by_role("link", name="first").focus()
    second = site.job("second")
    expect(page.locator(f'tr[data-job="{second}"]')).to_be_visible()
    assert page.evaluate("window.stays")
    expect(page.get_by_role("link", name="first")).to_be_focused()
