"""What is answered before the router is what the router would have answered."""

from collections.abc import Sequence
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from api import actions
from api.app import Application
from models.db import Database, Outcome
from models.domain.access import Scope
from models.domain.status import JobStatus
from models.registry import audit, job_reads, jobs, tenancy
from models.registry.page import Cursor
from tests.api.calls import expect, new_job, upload

URL = "/v1/fine_tuning/jobs"


def same(client: TestClient, path: str, again: str) -> None:
    quick, routed = client.get(path), client.get(f"{path}?{again}")
    assert quick.json() == routed.json()
    assert quick.headers["content-type"] == routed.headers["content-type"]
    assert quick.headers["x-request-id"].startswith("req_")


def test_jobs_are_those_of_the_route_whatever_changes(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    same(client, URL, "limit=20")
    made = [new_job(client, seed=n, metadata={"n": f"é{n}"}).json()["id"] for n in range(3)]
    asked: list[str] = []
    real = job_reads.row

    def noting(database: Database, project_id: str, job_id: str) -> job_reads.JobRow | None:
        asked.append(job_id)
        return real(database, project_id, job_id)

    monkeypatch.setattr(job_reads, "row", noting)
    for status in (None, JobStatus.QUEUED, JobStatus.CANCELLED):
        with database.write() as session:
            for job_id in made[:2] if status else ():
                assert jobs.move(session, job_id, status or JobStatus.FAILED)
        same(client, URL, "limit=20")
        for job_id in made:
            same(client, f"{URL}/{job_id}", "x=1")
    assert set(asked) == set(made)
    assert client.get(f"{URL}/{made[0]}").json()["status"] == "cancelled"


def test_what_it_does_not_know_is_refused_by_the_route(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = new_job(client).json()["id"]
    with database.write() as session:
        other = tenancy.create_project(session, "other")
        _, theirs = tenancy.create_key(session, other.id, "x")
        project = tenancy.default_project(session)
        _, infer = tenancy.create_key(session, project.id, "y", scopes=[Scope.INFER])
    for key, status in ((theirs, 404), (infer, 403), ("sk-no", 401)):
        for _ in range(2):  # known from the first time on
            answer = client.get(f"{URL}/{job_id}", headers={"authorization": f"Bearer {key}"})
            assert answer.status_code == status
    for path in (f"{URL}/ftjob-no", f"{URL}/{job_id[6:]}"):
        expect(client.get(path), 404, "fine_tuning_job_id", "fine_tuning_job_not_found")
    expect(client.get(f"{URL}x{job_id}"), 404, None, "unknown_url")

    def broken(*_: object) -> None:
        raise OperationalError("select", None, Exception("locked"))

    monkeypatch.setattr(job_reads, "row", broken)
    assert client.get(f"{URL}/{job_id}").json()["id"] == job_id


def _alike(answer: Any) -> Any:
    own = {"id", "created_at", "queue_position", "queue_length"}
    return {name: value for name, value in answer.json().items() if name not in own}


def test_a_job_is_created_as_by_the_route(client: TestClient, database: Database) -> None:
    file = upload(client).json()["id"]
    for more in ({}, {"metadata": {"a": "é"}, "suffix": "x", "peft": {"type": "lora", "r": 4}}):
        body = {"model": "base", "training_file": file, "seed": 3, **more}
        quick, routed = client.post(URL, json=body), client.post(f"{URL}?x=1", json=body)
        assert quick.status_code == routed.status_code == 200
        assert _alike(quick) == _alike(routed)
        assert quick.headers["x-request-id"].startswith("req_")
        with database.read() as session:
            project = tenancy.default_project(session).id
            noted = audit.list_page(session, project, Cursor(None, 2, "desc"))
            assert {each.object_id for each in noted.rows} == {
                quick.json()["id"],
                routed.json()["id"],
            }
            assert quick.headers["x-request-id"] in {each.request_id for each in noted.rows}


def test_a_job_is_refused_as_by_the_route(
    client: TestClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = upload(client).json()["id"]
    with database.write() as session:
        project = tenancy.default_project(session)
        _, reader = tenancy.create_key(session, project.id, "r", scopes=[Scope.READ])
    good = {"model": "base", "training_file": file}
    bodies: list[Any] = [
        {**good, "training_file": "file-no"},
        {**good, "model": "no"},
        {**good, "model": "ft:no"},
        {**good, "peft": {"type": "lora", "r": 0}},
        {**good, "sed": 1},
        {**good, "suffix": "a\0b"},
        [],
    ]
    for body in bodies:
        quick, routed = client.post(URL, json=body), client.post(f"{URL}?x=1", json=body)
        assert quick.status_code == routed.status_code >= 400
        assert quick.json() == routed.json()
    for _ in range(2):  # known from the first time on
        refused = client.post(URL, json=good, headers={"authorization": f"Bearer {reader}"})
        assert refused.status_code == 403
    broken = client.post(URL, content=b"{", headers={"content-type": "application/json"})
    expect(broken, 400, None, "invalid_json")

    def locked(*_: object) -> Sequence[Outcome[Any]]:
        raise OperationalError("insert", None, Exception("locked"))

    monkeypatch.setattr(actions, "submit_jobs", locked)
    for url in (URL, f"{URL}?x=1"):
        answer = client.post(url, json=good)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


def test_what_is_hot_passes_none_of_the_layers_of_fastapi(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "base", "training_file": upload(client).json()["id"]}

    passed_on: list[str] = []
    app = client.app
    assert isinstance(app, Application)
    rest = app._front._rest

    async def noting(scope: ASGIScope, receive: Receive, send: Send) -> None:
        passed_on.append(scope["method"])
        await rest(scope, receive, send)

    monkeypatch.setattr(app._front, "_rest", noting)
    made = client.post(URL, json=body).json()["id"]
    assert client.get(f"{URL}/{made}").json()["id"] == made
    assert [job["id"] for job in client.get(URL).json()["data"]] == [made]
    assert passed_on == []
    assert client.post(URL, json=body, headers={"idempotency-key": "a"}).status_code == 200
    assert passed_on == ["POST"]
