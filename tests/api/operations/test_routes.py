"""``/v1/workers`` and ``/v1/usage``: true of the caller's project, silent about the others."""

from typing import Any

from fastapi.testclient import TestClient
from sqlalchemy import update

from models.db import Database
from models.domain.machine import Device, Machine
from models.domain.status import JobStatus
from models.registry import job_runs, tenancy, workers
from models.registry.usage import DAY_SECONDS
from models.tables import Job
from tests.api.calls import chat, expect, new_job
from tests.api.fake_inference import FakeInference

CPU = Device(type="cpu", index=0, name="2 x CPU", memory_total=8, memory_used=3)
MACHINE = Machine(devices=(CPU,), memory_total=8, memory_available=5, memory_used=2)


def other_project(database: Database) -> dict[str, str]:
    with database.write() as session:
        other = tenancy.create_project(session, "other")
        _, secret = tenancy.create_key(session, other.id, "theirs")
    return {"authorization": f"Bearer {secret}"}


def test_a_worker_shows_its_job_to_the_jobs_project_alone(
    client: TestClient, database: Database, job_id: str, inference: FakeInference
) -> None:
    with database.write() as session:
        about = workers.Announcement("worker", "box", 7, "0.1.0", 2, MACHINE)
        workers.announce(session, about, 60)
        session.get_one(Job, job_id).lease_owner = workers.slot_owner("worker", 1)
    trains, serves = client.get("/v1/workers").json()["data"]
    assert (trains["kind"], trains["host"], trains["devices"][0]["name"]) == (
        "training",
        "box",
        "2 x CPU",
    )
    assert trains["memory"] == {"total": 8, "available": 5, "used": 2}
    idle, busy = trains["slots"]
    assert (idle["status"], idle["job_id"]) == ("idle", None)
    assert (busy["status"], busy["job_id"]) == ("busy", job_id)
    assert (serves["kind"], serves["base_model"]) == ("inference", "base")
    hidden = client.get("/v1/workers", headers=other_project(database)).json()["data"][0]
    assert hidden["slots"][1] == {
        "index": 1,
        "status": "busy",
        "job_id": None,
        "step": None,
        "total_steps": None,
    }


def test_usage_counts_served_and_trained_tokens_by_model_and_key(
    client: TestClient, database: Database, job_id: str, inference: FakeInference
) -> None:
    answer = chat(client).json()
    with database.write() as session:
        job_runs.fence(session, job_id, 1, trained_tokens=1234)
        job_runs.succeed(session, job_id, 1, fine_tuned_model="ft:x", trained_tokens=1234)
        job_runs.end_attempt(session, job_id, 1, "succeeded", 0)
        job_runs.end_attempt(session, job_id, 1, "lease_lost", None)
    bucket: Any
    (bucket,) = client.get("/v1/usage").json()["data"]
    assert bucket["end_time"] - bucket["start_time"] == DAY_SECONDS
    (result,) = bucket["results"]
    assert (result["model"], result["api_key_id"]) == (None, None)
    assert result["num_model_requests"] == 1
    assert result["input_tokens"] == answer["usage"]["prompt_tokens"]
    assert result["output_tokens"] == answer["usage"]["completion_tokens"]
    assert result["trained_tokens"] == 1234
    assert 0 < result["device_seconds"] < 600
    (key,) = client.get("/v1/api_keys").json()["data"]
    for name in ("group_by", "group_by[]"):  # the second is what the SDK makes of a list
        query = {name: ["model", "api_key_id"]}
        (grouped,) = client.get("/v1/usage", params=query).json()["data"][0]["results"]
        assert (grouped["model"], grouped["api_key_id"]) == ("base", key["id"])
    theirs = client.get("/v1/usage", headers=other_project(database)).json()
    assert theirs["data"] == []


def test_the_range_of_usage_is_checked(client: TestClient) -> None:
    day = 20_000 * DAY_SECONDS
    assert client.get(f"/v1/usage?start_time={day}&end_time={day + 1}").json()["data"] == []
    wrong = client.get(f"/v1/usage?start_time={day}&end_time={day - 1}")
    expect(wrong, 400, "end_time", "invalid_value")
    wide = client.get(f"/v1/usage?start_time=0&end_time={day}")
    assert "366 days" in expect(wide, 400, "start_time", "invalid_value")
    expect(client.get("/v1/usage?group_by=colour"), 400, "group_by[0]", "invalid_value")


def test_a_draining_worker_takes_no_job_until_it_is_resumed(
    client: TestClient, database: Database
) -> None:
    new_job(client)
    with database.write() as session:
        about = workers.Announcement("box:1", "box", 7, "0.1.0", 1, MACHINE)
        workers.announce(session, about, 60)
        session.execute(update(Job).values(status=JobStatus.QUEUED))

    def claimed() -> bool:
        with database.write() as session:
            return job_runs.claim(session, workers.slot_owner("box:1", 0), 60) is not None

    headers = other_project(database)
    expect(client.post("/v1/workers/none/drain"), 404, "worker_id", "not_found")
    refused = client.post("/v1/workers/box:1/drain", headers=headers)
    expect(refused, 403, None, "insufficient_permissions")
    assert client.post("/v1/workers/box:1/drain").json()["status"] == "draining"
    assert client.get("/v1/workers").json()["data"][0]["status"] == "draining"
    assert not claimed()
    assert client.post("/v1/workers/box:1/resume").json()["status"] == "online"
    assert claimed()
    entries = client.get("/v1/audit_logs").json()["data"]
    assert [each["type"] for each in entries][:2] == ["worker.resumed", "worker.drained"]
