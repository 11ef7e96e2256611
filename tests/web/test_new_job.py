"""The form of a new job: its estimate against the workers there are, and a newcomer's way."""

import json
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from sqlalchemy import func, select
from starlette.types import Receive, Scope, Send

from models.domain.estimates import BaseShape, LayerShape, Probe
from models.registry import inference_servers, probes
from models.registry.inference_servers import Announcement
from models.tables import BaseModel, BaseProbe, Job
from tests.api.fake_inference import FakeInference, serving
from tests.web.site import Site, rows
from worker.data.preview import TokenStatistics
from worker.training import methods, objectives

SHAPE = BaseShape(
    layers={"q_proj": LayerShape(outputs=2048, inputs=2048, count=200)}, n_other=10_000_000
)
PROBE = Probe(
    device="CPU",
    n_adapter=1_000_000,
    token_budget=1000,
    fixed_bytes=1,
    token_bytes=1e5,
    square_bytes=0.0,
    batch_seconds=0.1,
    token_seconds=1e-3,
    square_seconds=1e-6,
    trained_seconds=1e-3,
    update_seconds=0.05,
    forward_share=0.25,
    start_seconds=2.0,
)
MEMORY = 6 * 10**9
MEASURED = {"nf4": 2.0e9, "bf16": 4.0e9}
"""Memory of the trainer at rest, in bytes, as a worker would have measured it."""


class Counting(FakeInference):
    """Also counts the tokens of a data set, always with the same result."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/preview":
            await super().__call__(scope, receive, send)
            return
        counted = TokenStatistics(n_rows=40, n_tokens=800, n_trained=400, lengths=[20] * 40)
        body = {"max_length": 2048, "rows": [], "statistics": counted.model_dump(mode="json")}
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


@pytest.fixture
def measured(site: Site) -> Iterator[None]:
    """A base that was measured in every precision, and a server that counts tokens."""
    fake = Counting()
    with serving(fake, lifespan="off") as fake.url:
        with site.database.write() as session:
            session.get_one(BaseModel, "base").shape = SHAPE.model_dump(mode="json")
            for precision, n_bytes in MEASURED.items():
                row = BaseProbe(base_model="base", precision=precision)
                session.add(row)
                session.flush()
                probes.record(session, row, PROBE.model_copy(update={"fixed_bytes": int(n_bytes)}))
            announcement = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, announcement, 600)
        yield


def peak(page: Page, method: str, precision: str) -> int:
    """Choose a method and a precision; return the estimate of just that."""
    page.locator('[data-field="peft.type"]').select_option(method)
    page.locator('[data-field="precision.type"]').select_option(precision)
    expect(page.locator("#estimate")).to_have_attribute("data-of", f"{method} {precision}")
    return int(page.locator("#estimate").get_attribute("data-peak") or 0)


@pytest.mark.usefixtures("measured")
def test_from_full_to_qlora_takes_less_and_what_fits_no_worker_cannot_be_started(
    site: Site, page: Page, context: BrowserContext
) -> None:
    site.announce_worker(MEMORY)
    path = site.upload(rows(40))
    page.goto(f"/ui/jobs/new?file={path.rpartition('/')[2]}")
    found = [0]
    for method, precision in (("full", "bf16"), ("lora", "bf16"), ("lora", "nf4")):
        found.append(peak(page, method, precision))
        fits = found[-1] <= MEMORY
        expect(page.locator("#fits")).to_have_attribute("data-fits", "true" if fits else "false")
        expect(page.locator("#start")).to_be_enabled(enabled=fits)
    assert found[1] > found[2] > found[3]
    assert found[1] > MEMORY > found[3]
    peak(page, "full", "bf16")
    missing = re.compile(r"\d GB are missing on the largest")
    expect(page.locator("#fits [role=alert]")).to_contain_text(missing)
    assert site.faults == []


def test_every_plug_in_has_its_fields_and_only_the_chosen_ones_are_sent(
    site: Site, page: Page, context: BrowserContext
) -> None:
    path = site.upload(rows(20))
    page.goto(f"/ui/jobs/new?file={path.rpartition('/')[2]}")
    for group, plugins in (
        ("peft", methods.all_methods()),
        ("objective", objectives.all_objectives()),
    ):
        choice = page.locator(f'[data-field="{group}.type"]')
        offered = choice.locator("option").all_inner_texts()
        assert set(offered) == set(plugins)
        for name in offered:
            choice.select_option(name)
            body = json.loads(page.locator("#code").inner_text())
            assert body[group] == {"type": name}
            shown = page.locator(f'fieldset[data-plugin="{group}"]:not([hidden])')
            assert [each.get_attribute("data-name") for each in shown.all()] in ([name], [])
    page.locator('[data-field="peft.type"]').select_option("lora")
    page.locator("summary", has_text="Advanced").click()
    page.locator('fieldset[data-name="lora"] [data-field="peft.r"]').fill("5")
    page.locator('[data-field="optimizer.weight_decay"]').fill("0.01")
    body = json.loads(page.locator("#code").inner_text())
    assert body["peft"] == {"type": "lora", "r": 5}
    assert body["optimizer"] == {"weight_decay": 0.01, "type": "adamw"}


def test_a_newcomer_has_a_job_after_three_clicks(site: Site, page: Page) -> None:
    page.goto("/ui/jobs")
    page.get_by_role("button", name="Use the sample data set").click()
    page.wait_for_url("**/ui/jobs/new?file=*")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile("/ui/jobs/ftjob-"))
    job = site.status(page.url.rpartition("/")[2])
    assert job.status in ("validating_files", "queued")
    expect(page.locator("#status .status")).to_have_attribute("data-status", job.status)


def test_a_job_is_duplicated_with_what_would_fit(site: Site, page: Page) -> None:
    job_id = site.job("too-large", max_seq_length=512, precision={"type": "bf16"})
    site.start(job_id)
    site.fail(job_id, "The worker ran out of memory.")
    page.goto(f"/ui/jobs/{job_id}")
    page.locator("#remedies").get_by_role("link", name="rows of at most 256 tokens").click()
    page.wait_for_url("**/ui/jobs/new?from=*")
    expect(page.locator('[data-field="max_seq_length"]')).to_have_value("256")
    expect(page.locator('[data-field="precision.type"]')).to_have_value("bf16")
    expect(page.locator('[data-field="suffix"]')).to_have_value("too-large")


def test_a_refused_job_is_explained_at_its_field(
    site: Site, page: Page, context: BrowserContext
) -> None:
    path = site.upload(rows(20))
    page.goto(f"/ui/jobs/new?file={path.rpartition('/')[2]}")
    page.locator('[data-field="optimizer.learning_rate"]').fill("-1")
    page.get_by_role("button", name="Start").click()
    field = page.locator('[data-field="optimizer.learning_rate"]')
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#summary")).to_be_focused()
    assert page.locator("#summary").inner_text() != ""
    with site.database.read() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_what_the_service_refuses_is_grey_and_says_why(site: Site, page: Page) -> None:
    with site.database.write() as session:
        session.get_one(BaseModel, "base").shape = SHAPE.model_dump(mode="json")
    page.goto(f"/ui/jobs/new?file={site.upload(rows(20)).rpartition('/')[2]}")

    def grey(field: str) -> list[str]:
        options = page.locator(f'[data-field="{field}"] option:disabled')
        found: list[str] = options.evaluate_all("each => each.map(option => option.value)")
        return found

    assert grey("precision.type") == []
    assert "mlm" in grey("objective.type")  # the base is no encoder
    assert grey("peft.type") == ["bitfit"]  # it has no biases
    page.locator('[data-field="peft.type"]').select_option("full")
    assert grey("precision.type") == ["nf4", "int8"]
    why = page.locator('[data-field="precision.type"] + [data-why]')
    expect(why).to_contain_text("Full fine-tuning does not train on a base held in 'nf4'")
    page.locator('[data-field="precision.type"]').select_option("bf16")
    expect(why).to_have_text("Not with this choice: nf4, int8.")
