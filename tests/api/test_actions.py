"""What routes do across database, store and queue."""

import asyncio
import unicodedata

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from api.actions import display_name
from models.db import Database
from models.domain.limits import ProjectLimits
from models.domain.status import JobStatus
from models.registry import jobs, tenancy
from models.settings import Settings
from models.storage import open_store, token_key
from models.tables import File
from tests.api.calls import ROW, expect, new_job, upload


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("/", "upload"),
        ("", "upload"),
        ("  \t ", "upload"),
        ("a\u202egpj.exe", "agpj.exe"),
        ("a\x00b\r\nc", "abc"),
        ("\ud800", "upload"),
        ("x" * 500, "x" * 255),
        ("é" * 500, "é" * 127),
        ("COM1.jsonl", "upload"),
    ],
)
def test_a_display_name_has_no_folder_and_no_control_character(sent: str, shown: str) -> None:
    assert display_name(sent) == shown
    assert not any(unicodedata.category(char).startswith("C") for char in display_name(sent))


def test_a_validation_file_is_in_use_too(client: TestClient) -> None:
    file_id = upload(client).json()["id"]
    new_job(client, validation_file=file_id)
    expect(client.delete(f"/v1/files/{file_id}"), 400, "file_id", "file_in_use")
    assert client.get(f"/v1/files/{file_id}/content").content == ROW


@pytest.mark.parametrize("end", [JobStatus.FAILED, JobStatus.CANCELLED])
def test_a_file_of_an_ended_job_can_go(
    client: TestClient, database: Database, end: JobStatus
) -> None:
    job = new_job(client).json()
    with database.write() as session:
        assert jobs.move(session, job["id"], end)
    assert client.delete(f"/v1/files/{job['training_file']}").json()["deleted"]
    assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json()["training_file"]


def test_the_bytes_of_a_file_stay_when_its_deletion_is_rolled_back(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = upload(client).json()["id"]

    def broken(*_: object) -> None:
        raise RuntimeError("after the row was deleted")

    monkeypatch.setattr("api.actions.after_commit", broken)
    expect(client.delete(f"/v1/files/{file_id}"), 500, None, "internal_error")
    assert client.get(f"/v1/files/{file_id}/content").content == ROW


@pytest.mark.parametrize("route", ["delete", "lint anew"])
def test_tokenised_rows_go_with_the_last_file_of_their_content(
    client: TestClient, database: Database, settings: Settings, route: str
) -> None:
    store = open_store(settings.storage)
    twins = [upload(client, ROW + b"\n" * n).json()["id"] for n in range(2)]
    with database.write() as session:
        session.execute(update(File).values(data_sha256="d" * 64))
    store.put(token_key("d" * 64, "k"), b"tokens")
    store.put(token_key("e" * 64, "k"), b"tokens of other rows")

    def drop(file_id: str) -> None:
        if route == "delete":
            assert client.delete(f"/v1/files/{file_id}").is_success
        else:
            assert client.post(f"/v1/files/{file_id}/lint", json={}).is_success

    drop(twins[0])
    assert len(store.list("tokens")) == 2
    drop(twins[1])
    assert [info.key for info in store.list("tokens")] == [token_key("e" * 64, "k")]


def test_jobs_that_are_submitted_at_once_count_towards_a_limit_and_one_refused_harms_no_other(
    client: TestClient, database: Database
) -> None:
    file_id = upload(client).json()["id"]
    with database.write() as session:
        project = tenancy.default_project(session)
        tenancy.set_limits(session, project, ProjectLimits(max_waiting_jobs=2))
    files = [file_id, "file-none", file_id, file_id]

    async def submit() -> list[int]:
        app = client.app
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app),
            base_url="http://test",
            headers=dict(client.headers),
        ) as wire:
            bodies = [{"model": "base", "training_file": each} for each in files]
            url = "/v1/fine_tuning/jobs"
            answers = await asyncio.gather(*(wire.post(url, json=body) for body in bodies))
        return [answer.status_code for answer in answers]

    assert client.portal is not None
    assert sorted(client.portal.call(submit)) == [200, 200, 404, 429]
    listed = client.get("/v1/fine_tuning/jobs").json()["data"]
    entries = client.get("/v1/audit_logs").json()["data"]
    created = "fine_tuning.job.created"
    named = {each[created]["id"] for each in entries if each["type"] == created}
    assert all(each["request_id"].startswith("req_") for each in entries)
    assert {job["id"] for job in listed} == named
    for job in listed:
        events = client.get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"]
        assert [event["sequence"] for event in events] == [2, 1]
        assert client.get(f"/v1/fine_tuning/jobs/{job['id']}").json() == job
