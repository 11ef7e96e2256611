"""What is answered before the router is what the router would have answered."""

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from models.db import Database
from models.domain.access import Scope
from models.domain.status import JobStatus
from models.registry import job_reads, jobs, tenancy
from tests.api.calls import expect, new_job

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
