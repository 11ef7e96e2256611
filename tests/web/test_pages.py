"""The page in a real browser, under its strict policy."""

import json
import re

import pytest
from playwright.sync_api import Browser, BrowserContext, FilePayload, Page, expect
from sqlalchemy import func, select

from models.domain.status import JobStatus
from models.registry import adapters, jobs
from models.tables import Job
from tests.web.conftest import ADAPTER, AXE, TOTAL_STEPS, Site, open_context, rows

TURN = """hidden => {
    Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});
    document.dispatchEvent(new Event('visibilitychange'));
}"""
HOSTILE = '<script>document.title="owned"</script><img src=x onerror=alert(1)>'


def everything(site: Site) -> list[str]:
    """Fill the service, and return the path of every page."""
    done = site.job("harbour-desk")
    site.start(done)
    site.steps(done, 1, TOTAL_STEPS)
    site.checkpoint(done, 40)
    site.checkpoint(done, TOTAL_STEPS)
    site.finish(done)
    site.publish(done, ADAPTER)
    failed = site.job("too-large")
    site.start(failed)
    site.fail(failed, "The worker ran out of memory. Lower max_seq_length.")
    running = site.job("night-watch")
    site.start(running)
    site.steps(running, 1, 48)
    site.job("waiting")
    site.announce_worker(8 * 10**9)
    return [
        "/ui/jobs",
        "/ui/jobs?status=failed",
        "/ui/jobs/new",
        *(f"/ui/jobs/{each}" for each in (done, failed, running)),
        "/ui/datasets",
        "/ui/models",
        f"/ui/models/{ADAPTER}",
        "/ui/playground",
        "/ui/keys",
        "/ui/workers",
        "/ui/usage",
        "/ui/settings",
        "/ui/compare?ids=" + ",".join((done, running)),
    ]


def upload(site: Site, context: BrowserContext, data: bytes) -> str:
    page = context.new_page()
    page.goto(f"{site.url}/ui/datasets")
    page.locator("#file").set_input_files(
        FilePayload(name="rows.jsonl", mimeType="application/jsonl", buffer=data)
    )
    page.wait_for_url(re.compile("/ui/datasets/file-"))
    site.lint()
    path = page.url.removeprefix(site.url)
    page.close()
    return path


def test_every_page_loads_without_an_error_or_a_foreign_request(
    site: Site, page: Page, context: BrowserContext
) -> None:
    paths = [*everything(site), upload(site, context, rows(20))]
    for path in paths:
        response = page.goto(path)
        assert response is not None
        assert response.status == 200, path
        policy = response.headers["content-security-policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        page.wait_for_timeout(150)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
    # Without an inference server the preview and the estimate of this site answer 503, as said.
    assert [each for each in site.faults if "503" not in each] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(browser: Browser, site: Site, theme: str) -> None:
    context = open_context(browser, site, color_scheme=theme, bypass_csp=True)
    paths = [*everything(site), "/ui/login"]
    page = context.new_page()
    for path in paths:
        page.goto(path)
        page.wait_for_timeout(150)
        page.add_script_tag(path=AXE)
        found = page.evaluate(
            "axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa']})"
        )
        problems = [
            (path, each["id"], [node["html"][:120] for node in each["nodes"]])
            for each in found["violations"]
        ]
        assert problems == []
    context.close()


def test_who_is_not_logged_in_is_led_to_the_login_and_back(browser: Browser, site: Site) -> None:
    context = browser.new_context(base_url=site.url)
    page = context.new_page()
    page.goto("/ui/models")
    page.wait_for_url("**/ui/login?next=*")
    page.get_by_label("API key").fill("sk-wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("alert")).to_have_text("That key is not valid.")
    page.get_by_label("API key").fill(site.key)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/ui/models")
    (cookie,) = [each for each in context.cookies() if each["name"] == "tunery_session"]
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    assert site.key not in json.dumps(context.storage_state())
    context.close()


def test_a_change_by_cookie_needs_the_pages_token_and_origin(
    site: Site, context: BrowserContext
) -> None:
    job_id = site.job()
    path = f"/v1/fine_tuning/jobs/{job_id}/pause"
    for headers in ({}, {"x-tunery-csrf": "x"}, {"sec-fetch-site": "cross-site"}):
        refused = context.request.post(path, headers=headers)
        assert refused.status == 403
        assert refused.json()["error"]["code"] == "csrf_failed"
    assert site.status(job_id).status == "queued"


def test_an_upload_shows_its_progress_and_then_its_report(
    site: Site, page: Page, context: BrowserContext
) -> None:
    path = upload(site, context, rows(2000))
    page.goto(path)
    expect(page.locator("#usable")).to_have_attribute("data-usable", "2000")
    page.get_by_role("link", name="New job").click()
    page.wait_for_url("**/ui/jobs/new?file=*")
    assert page.locator('[data-field="training_file"]').input_value() in page.url


def test_planted_faults_are_shown_with_their_lines(
    site: Site, page: Page, context: BrowserContext
) -> None:
    lines = rows(6).split(b"\n")
    lines[1] = b"{"
    lines[3] = b'{"messages": [{"role": "user"}]}'
    lines[5] = b"[]"
    page.goto(upload(site, context, b"\n".join(lines)))
    found = page.locator("#findings tr.error")
    shown = {found.nth(at).get_attribute("data-line") for at in range(found.count())}
    assert shown == {"2", "4", "6"}
    expect(page.locator("#findings mark").first).to_be_visible()


def test_hostile_text_is_text(site: Site, page: Page) -> None:
    job_id = site.job("desk")
    site.start(job_id)
    site.say(job_id, HOSTILE)
    page.on("dialog", lambda dialog: site.faults.append(dialog.message))
    page.goto(f"/ui/jobs/{job_id}")
    site.say(job_id, f"live {HOSTILE}")
    expect(page.locator("#events li", has_text="live <script>")).to_be_visible()
    assert page.locator("#events script, #events img").count() == 0
    assert "owned" not in page.title()
    assert site.faults == []


def test_a_refused_job_is_explained_at_its_field(
    site: Site, page: Page, context: BrowserContext
) -> None:
    path = upload(site, context, rows(20))
    page.goto(f"/ui/jobs/new?file={path.rpartition('/')[2]}")
    page.locator('[data-field="optimizer.learning_rate"]').fill("-1")
    page.get_by_role("button", name="Start").click()
    field = page.locator('[data-field="optimizer.learning_rate"]')
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#summary")).to_be_focused()
    assert page.locator("#summary").inner_text() != ""
    with site.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_a_job_is_started_and_followed_live(
    site: Site, page: Page, context: BrowserContext
) -> None:
    path = upload(site, context, rows(40))
    page.goto(f"/ui/jobs/new?file={path.rpartition('/')[2]}")
    page.locator('[data-field="suffix"]').fill("evening")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/ui/jobs/ftjob-"))
    job_id = page.url.rpartition("/")[2]
    with site.database.write() as session:
        jobs.move(session, job_id, JobStatus.QUEUED)
    site.start(job_id)
    expect(page.locator("#status .status")).to_have_attribute("data-status", "running")
    for first, last in ((1, 12), (13, 30), (31, 47)):
        site.steps(job_id, first, last)
        expect(page.locator("#step")).to_have_attribute("data-last-step", str(last))
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", "47")
    expect(page.locator("#loss-chart")).to_have_attribute("data-series", "train,valid")
    assert page.locator("#bar").evaluate("bar => bar.value") == 47
    expect(page).to_have_title(re.compile(r"^39 % evening"))
    expect(page.locator("#mark")).to_have_attribute("data-state", "open")
    site.checkpoint(job_id, 40)
    expect(page.locator('#checkpoints tr[data-step="40"]')).to_be_visible()
    page.reload()
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", "47")
    site.steps(job_id, 48, TOTAL_STEPS)
    site.finish(job_id)
    expect(page.locator("#status .status")).to_have_attribute("data-status", "succeeded")
    expect(page.locator("#loss-chart")).to_have_attribute("data-points", str(TOTAL_STEPS))
    expect(page.locator("#mark")).to_have_attribute("data-state", "ended")
    expect(page.get_by_role("button", name="Pause")).to_be_hidden()
    assert site.faults == []


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


def test_a_failure_is_shown_with_its_cause(site: Site, page: Page) -> None:
    job_id = site.job()
    site.start(job_id)
    page.goto(f"/ui/jobs/{job_id}")
    site.fail(job_id, "The worker ran out of memory. Lower max_seq_length.")
    expect(page.locator("#failure")).to_contain_text("Lower max_seq_length", timeout=3000)
    expect(page.locator("#eta")).to_have_text("–")
    page.goto("/ui/jobs")
    expect(page.locator(f'tr[data-job="{job_id}"]')).to_contain_text("out_of_memory")


def test_the_list_shows_a_new_job_without_a_reload(site: Site, page: Page) -> None:
    site.job("first")
    page.goto("/ui/jobs")
    page.evaluate("window.stays = true")
    second = site.job("second")
    expect(page.locator(f'tr[data-job="{second}"]')).to_be_visible()
    assert page.evaluate("window.stays")


def test_without_javascript_lists_and_jobs_show_their_data(browser: Browser, site: Site) -> None:
    context = open_context(browser, site, java_script_enabled=False)
    job_id = site.job("desk")
    site.start(job_id)
    site.steps(job_id, 1, 20)
    page = context.new_page()
    page.goto("/ui/jobs")
    expect(page.get_by_role("link", name="desk")).to_be_visible()
    page.goto(f"/ui/jobs/{job_id}")
    expect(page.locator("#step")).to_have_text("20 / 120")
    page.goto("/ui/models")
    expect(page.get_by_role("heading", name="base")).to_be_visible()
    context.close()


def test_pages_are_small_and_fit_a_phone(browser: Browser, site: Site) -> None:
    context = open_context(browser, site, viewport={"width": 390, "height": 844})
    sizes: list[int] = []
    context.on("response", lambda answer: sizes.append(len(answer.body())))
    for path in everything(site):
        page = context.new_page()
        sizes.clear()
        page.goto(path)
        page.wait_for_load_state("load")
        assert page.evaluate("document.documentElement.scrollWidth <= 390"), path
        assert sum(sizes) <= 250_000, path
        page.close()
    context.close()


def test_a_key_is_shown_once_works_and_is_revoked(
    site: Site, page: Page, context: BrowserContext
) -> None:
    page.goto("/ui/keys")
    page.get_by_label("Name of a new key").fill("laptop")
    page.get_by_role("button", name="Make a key").click()
    secret = page.locator("#secret-value")
    expect(secret).to_contain_text("sk-tunery-")
    headers = {"authorization": f"Bearer {secret.inner_text()}"}
    assert context.request.get("/v1/models", headers=headers).status == 200
    value = secret.inner_text()
    page.reload()
    assert value not in page.content()
    row = page.get_by_role("row", name="laptop")
    row.get_by_role("button", name="Revoke").click()
    page.get_by_role("dialog").get_by_role("button", name="Revoke the key").click()
    expect(page.get_by_role("row", name="laptop")).to_contain_text("revoked")
    assert context.request.get("/v1/models", headers=headers).status == 401


def test_an_unknown_page_and_a_foreign_job_are_pages_that_say_so(site: Site, page: Page) -> None:
    for path in ("/ui/nothing", "/ui/jobs/ftjob-nothing"):
        response = page.goto(path)
        assert response is not None
        assert response.status == 404
        expect(page.get_by_role("heading", name="404")).to_be_visible()


def test_the_page_speaks_japanese_to_those_who_ask_for_it(browser: Browser, site: Site) -> None:
    context = browser.new_context(base_url=site.url, locale="ja-JP")
    page = context.new_page()
    page.goto("/ui/login")
    assert page.locator("html").get_attribute("lang") == "ja"
    expect(page.get_by_role("button", name="ログイン")).to_be_visible()
    context.close()


def test_a_models_page_leads_to_what_it_came_from_and_what_came_of_it(
    site: Site, page: Page, context: BrowserContext
) -> None:
    data = upload(site, context, rows(20)).rpartition("/")[2]
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
    # Without an inference server the data set has no preview on this site.
    assert [each for each in site.faults if "503" not in each] == []
