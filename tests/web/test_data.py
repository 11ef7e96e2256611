"""Data sets: uploads, their reports, and text that would like to be more than text."""

import json
import re

from playwright.sync_api import FilePayload, Page, expect

from tests.web.site import HOSTILE, Site, rows

HOSTILE_NAME = "<img src=x onerror=alert(1)>.jsonl"  # of a path, the last part would be the name
# The bar is gone with the page, so the highest value that it showed is kept in the tab.
KEEP_PROGRESS = """() => {
    const bar = document.getElementById('upload');
    const keep = () => sessionStorage.setItem('share', String(bar.value));
    new MutationObserver(keep).observe(
        document.getElementById('upload-text'), {childList: true, characterData: true});
}"""


def test_an_upload_shows_its_progress_and_then_its_report(site: Site, page: Page) -> None:
    page.goto("/ui/datasets")
    page.evaluate(KEEP_PROGRESS)
    data = rows(2000)
    file = FilePayload(name="rows.jsonl", mimeType="application/jsonl", buffer=data)
    page.locator("#file").set_input_files(file)
    page.wait_for_url(re.compile("/ui/datasets/file-"))
    assert page.evaluate("sessionStorage.getItem('share')") == "100"
    site.lint()
    # The page notices by itself that the file has been checked.
    expect(page.locator("#usable")).to_have_attribute("data-usable", "2000")
    page.get_by_role("link", name="New job").click()
    page.wait_for_url("**/ui/jobs/new?file=*")
    assert page.locator('[data-field="training_file"]').input_value() in page.url


def test_planted_faults_are_shown_with_their_lines(site: Site, page: Page) -> None:
    lines = rows(6).split(b"\n")
    lines[1] = b"{"
    lines[3] = b'{"messages": [{"role": "user"}]}'
    lines[5] = b"[]"
    page.goto(site.upload(b"\n".join(lines)))
    found = page.locator("#findings tr.error")
    shown = {
        each.get_attribute("data-line"): each.locator(".tag").inner_text() for each in found.all()
    }
    assert shown == {"2": "invalid_json", "4": "missing_content", "6": "not_an_object"}
    expect(page.locator("#findings mark").first).to_be_visible()


def test_hostile_text_is_text(site: Site, page: Page) -> None:
    job_id = site.job("desk")
    site.start(job_id)
    site.say(job_id, HOSTILE)
    page.on("dialog", lambda dialog: site.faults.append(dialog.message))
    row = {"messages": [{"role": "user", "content": HOSTILE}, {"role": HOSTILE, "content": "x"}]}
    data = site.upload(rows(4) + b"\n" + json.dumps(row).encode(), name=HOSTILE_NAME)
    hostile_job = site.job(HOSTILE, training_file=data.rpartition("/")[2])
    for path in ("/ui/jobs", f"/ui/jobs/{hostile_job}", "/ui/datasets", data, "/ui/jobs/new"):
        page.goto(path)
        expect(page.locator("main")).to_contain_text("onerror=alert(1)>")
        assert page.locator("script:not([src]):not([type='application/json'])").count() == 0
        assert page.locator("main img").count() == 0
    page.goto(f"/ui/jobs/{job_id}")
    site.say(job_id, f"live {HOSTILE}")
    expect(page.locator("#events li", has_text="live <script>")).to_be_visible()
    assert page.locator("#events script, #events img").count() == 0
    assert "owned" not in page.title()
    # Without an inference server the data set has no preview on this site.
    assert [each for each in site.faults if "503" not in each] == []
