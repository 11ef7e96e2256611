"""Pages of workers, usage, keys and settings, and what they show to which key."""

import csv
import io

import pytest
from fastapi.testclient import TestClient

from api import page_session
from models.db import Database
from models.domain.access import Scope
from models.domain.machine import Device, Machine
from models.registry import tenancy, usage, workers
from models.registry.usage import Used, User

CPU = Device(type="cpu", index=0, name="2 x CPU", memory_total=8 * 10**9, memory_used=3 * 10**9)
MACHINE = Machine(
    devices=(CPU,), memory_total=8 * 10**9, memory_available=5 * 10**9, memory_used=2 * 10**9
)


@pytest.fixture
def page(client: TestClient, database: Database) -> TestClient:
    """A client that is logged in to the page with an admin key."""
    del client.headers["authorization"]
    return log_in(client, database, "boss", (Scope.ADMIN,))


def log_in(
    client: TestClient, database: Database, name: str, scopes: tuple[Scope, ...]
) -> TestClient:
    with database.write() as session:
        project = tenancy.default_project(session)
        key, _ = tenancy.create_key(session, project.id, name, scopes)
    client.cookies.set(page_session.COOKIE, page_session.make_cookie(key))
    return client


def announce(database: Database, worker_id: str, seconds: float) -> None:
    with database.write() as session:
        about = workers.Announcement(worker_id, f"host-of-{worker_id}", 7, "0.1.0", 1, MACHINE)
        workers.announce(session, about, seconds)


def test_a_worker_that_falls_silent_is_shown_as_offline(
    page: TestClient, database: Database
) -> None:
    assert "No worker is connected" in page.get("/ui/workers").text
    announce(database, "a", 60)
    text = page.get("/ui/workers").text
    assert "host-of-a" in text
    assert "3 GB of 8 GB used" in text
    assert 'data-worker="a" data-status="online"' in text
    announce(database, "a", -1)
    assert 'data-worker="a" data-status="offline"' in page.get("/ui/workers/table").text


def test_only_the_operators_admin_key_is_offered_to_drain_a_worker(
    page: TestClient, database: Database
) -> None:
    announce(database, "a", 60)
    assert 'data-worker-action="drain"' in page.get("/ui/workers").text
    with database.write() as session:
        workers.set_draining(session, "a", True)
    text = page.get("/ui/workers/table").text
    assert 'data-status="draining"' in text
    assert 'data-worker-action="resume"' in text
    with database.write() as session:
        other = tenancy.create_project(session, "other")
        key, _ = tenancy.create_key(session, other.id, "theirs")
    page.cookies.set(page_session.COOKIE, page_session.make_cookie(key))
    assert "data-worker-action" not in page.get("/ui/workers").text


def test_usage_is_shown_by_day_model_and_key_and_as_csv(
    page: TestClient, database: Database
) -> None:
    with database.write() as session:
        project = tenancy.default_project(session)
        key, _ = tenancy.create_key(session, project.id, "=evil()", (Scope.INFER,))
        served = Used(requests=2, prompt_tokens=30, completion_tokens=12)
        usage.add(session, [(User(project.id, key.id, "base"), served)])
        usage.add(session, [(User(project.id, None, "base"), Used(trained_tokens=5000))])
    text = page.get("/ui/usage?days=7&by=model").text
    assert 'data-tokens="5000"' in text
    assert '<tr data-name="base">' in text
    by_key = page.get("/ui/usage?by=key&format=csv")
    assert by_key.headers["content-type"].startswith("text/csv")
    head, *rows = csv.reader(io.StringIO(by_key.text))
    assert head[:2] == ["key", "num_model_requests"]
    # A name is no formula for whoever opens the file in a spreadsheet.
    assert {row[0]: row[1:4] for row in rows} == {
        "": ["0", "0", "0"],
        "'=evil()": ["2", "30", "12"],
    }
    (day,) = list(csv.reader(io.StringIO(page.get("/ui/usage?format=csv").text)))[1:]
    assert day[4] == "5000"


@pytest.mark.parametrize(
    ("scope", "changes", "asks"),
    [(Scope.READ, False, False), (Scope.TRAIN, True, False), (Scope.ADMIN, True, True)],
)
def test_a_page_offers_what_its_key_may_do(
    client: TestClient, database: Database, job_id: str, scope: Scope, changes: bool, asks: bool
) -> None:
    del client.headers["authorization"]
    page = log_in(client, database, "some", (scope,))
    assert ('/ui/jobs/new"' in page.get("/ui/jobs").text) == changes
    assert ('id="drop"' in page.get("/ui/datasets").text) == changes
    job = page.get(f"/ui/jobs/{job_id}").text
    assert ('data-may="yes"' in job) == changes
    assert ('id="samples"' in job) == asks
    keys = page.get("/ui/keys")
    assert keys.status_code == (200 if scope == Scope.ADMIN else 403)
    assert ('/ui/keys"' in page.get("/ui/settings").text) == (scope == Scope.ADMIN)


def test_a_key_that_may_not_read_is_told_so(client: TestClient, database: Database) -> None:
    del client.headers["authorization"]
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "caller", (Scope.INFER,))
    answer = client.post("/ui/session", data={"key": secret})
    assert answer.status_code == 403
    assert "may not read" in answer.text
    assert page_session.COOKIE not in client.cookies


def test_the_language_and_the_smoothing_are_as_the_person_chose(page: TestClient) -> None:
    page.cookies.set("tunery_language", "ja")
    page.cookies.set("tunery_smoothing", "0.25")
    text = page.get("/ui/settings").text
    assert '<html lang="ja"' in text
    assert 'value="0.25"' in text
    for nonsense in ("nan", "2", "x"):
        page.cookies.set("tunery_smoothing", nonsense)
        assert 'value="0.9"' in page.get("/ui/settings").text
    page.cookies.set("tunery_language", "../etc")
    page.cookies.set("tunery_theme", "<b>")
    assert '<html lang="en" data-theme="system"' in page.get("/ui/settings").text


@pytest.mark.parametrize("path", ["/ui/nothing", "/ui/jobs/ftjob-nothing", "/ui/jobs?after=x"])
def test_an_error_keeps_the_menu_of_who_is_logged_in(page: TestClient, path: str) -> None:
    answer = page.get(path)
    assert answer.status_code in (400, 404)
    assert 'class="side"' in answer.text
    assert "Request req_" in answer.text


@pytest.mark.usefixtures("job_id")
def test_a_data_set_that_is_not_checked_yet_is_in_the_list(
    client: TestClient, database: Database
) -> None:
    del client.headers["authorization"]
    page = log_in(client, database, "boss", (Scope.ADMIN,))
    text = page.get("/ui/datasets").text
    assert 'data-status="uploaded"' in text
