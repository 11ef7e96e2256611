"""How many streams the page holds, and what the curves of a job show."""

from playwright.sync_api import BrowserContext, Page, expect

from models.domain.reports import StepMetrics
from models.registry import metrics
from tests.flow.conftest import wait_until
from tests.web.site import TOTAL_STEPS, Site
from tests.web.test_jobs import TURN

N_TABS = 8


def n_streams(site: Site) -> int:
    assert site.app is not None
    count: int = site.app.state.services.feed.n_readers
    return count


def test_eight_tabs_load_and_hidden_ones_hold_no_stream(
    site: Site, context: BrowserContext
) -> None:
    """A browser gives a host six connections; the seventh tab must not wait for one."""
    running = []
    for at in range(N_TABS):
        running.append(site.job(f"tab-{at}"))
        site.start(running[-1])
        site.steps(running[-1], 1, 5)
    tabs: list[Page] = []
    for job_id in running:
        if tabs:
            tabs[-1].evaluate(TURN, True)
        page = context.new_page()
        page.goto(f"/ui/jobs/{job_id}")
        expect(page.locator("#mark")).to_have_attribute("data-state", "open")
        expect(page.locator("#loss-chart")).to_have_attribute("data-points", "5")
        tabs.append(page)
    wait_until(lambda: n_streams(site) == 1, 20, "hidden tabs close their streams")
    site.steps(running[0], 6, 9)
    tabs[-1].evaluate(TURN, True)
    tabs[0].evaluate(TURN, False)
    expect(tabs[0].locator("#loss-chart")).to_have_attribute("data-points", "9")
    wait_until(lambda: n_streams(site) == 1, 20, "one stream for the tab that is seen")
    assert site.faults == []


def curves(page: Page) -> list[list[float]]:
    """Return the raw and the smoothed train losses as they are drawn."""
    found: list[list[float]] = page.evaluate(
        """() => {
            const data = document.getElementById('loss-chart').dataset;
            return [JSON.parse(data.raw), JSON.parse(data.smoothed)];
        }"""
    )
    return found


def test_without_smoothing_the_curve_is_the_raw_one_and_log_takes_zero(
    site: Site, page: Page
) -> None:
    job_id = site.job()
    site.start(job_id)
    site.steps(job_id, 1, 30)
    falling = [
        StepMetrics(
            step=step,
            epoch=1,
            train_loss=0.0 if step > 33 else 10.0**-step,
            train_mean_token_accuracy=1,
            learning_rate=1e-4,
            grad_norm=0,
            tokens=9,
            trained_tokens=9,
            tokens_per_second=9,
        )
        for step in range(31, 36)
    ]
    with site.database.write() as session:
        metrics.record(session, job_id, 1, falling, TOTAL_STEPS)
    page.goto(f"/ui/jobs/{job_id}")
    chart = page.locator("#loss-chart")
    expect(chart).to_have_attribute("data-points", "35")
    raw, smoothed = curves(page)
    assert raw != smoothed
    assert raw[-1] == 0
    page.locator("#smoothing").fill("0")
    raw, smoothed = curves(page)
    assert raw == smoothed
    page.locator("#log").check()
    expect(chart.locator("canvas")).to_be_visible()
    page.locator("#smoothing").fill("0.9")
    assert site.faults == []


def test_three_jobs_are_compared_by_curves_results_and_what_differs(site: Site, page: Page) -> None:
    chosen = []
    for name, rate in (("low", 1e-4), ("middle", 2e-4), ("high", 3e-4)):
        chosen.append(site.job(name, optimizer={"learning_rate": rate}))
        site.start(chosen[-1])
        site.steps(chosen[-1], 1, 40 + 20 * len(chosen))
    page.goto("/ui/jobs")
    for job_id in chosen:
        page.get_by_label(f"Compare {job_id}").check()
    page.get_by_role("button", name="Compare").click()
    page.wait_for_url("**/ui/compare?ids=*")

    def seen() -> tuple[list[str], list[str], list[str]]:
        legend = page.locator("#curves .u-legend .u-series .u-label").all_inner_texts()
        settings = page.locator("#differences tr[data-setting]:not([hidden])")
        names = [each.get_attribute("data-setting") or "" for each in settings.all()]
        best = page.locator("#results td[data-best]")
        return legend, names, best.all_inner_texts()

    expect(page.locator("#curves .u-legend .u-series")).to_have_count(4)  # the steps, three curves
    first = seen()
    assert sorted(first[0][1:]) == ["high", "low", "middle"]
    assert set(first[1]) == {"optimizer.learning_rate", "user_provided_suffix"}
    assert len(set(first[2])) == 2  # the best train loss and the best held-out loss
    page.get_by_label("All settings").check()
    assert {"peft.r", *first[1]} < set(seen()[1])
    page.get_by_label("All settings").uncheck()
    address = page.url
    again = page.context.new_page()
    page.close()
    page = again
    page.goto(address)
    expect(page.locator("#curves .u-legend .u-series")).to_have_count(4)
    assert seen() == first
    assert site.faults == []
