"""Batches run by themselves, survive their process, and end with every line accounted for."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from api import batches
from api.app import create_app
from models.db import Database, db_now
from models.errors import CapacityError, UnavailableError
from models.registry import batches as registry
from models.registry import inference_servers, tenancy
from models.registry.inference_servers import Announcement
from models.settings import Settings, child_environment
from models.tables import Batch, BatchResult, File
from tests.api.calls import batch_line, expect, new_batch
from tests.api.fake_inference import HELLO, FakeInference, Hold, running_fake

LINES = [batch_line(f"line {number}") for number in range(12)]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "FLUSH_SECONDS", 0.05)
    monkeypatch.setattr(batches, "POLL_SECONDS", 0.2)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    limits = settings.api.model_copy(update={"max_upload_bytes": 10_000})
    return settings.model_copy(update={"api": limits})


def ended(client: TestClient, batch_id: str, *statuses: str) -> Any:
    """Wait for a batch to come to one of some states; return it."""
    deadline = time.monotonic() + 30
    while True:
        batch = client.get(f"/v1/batches/{batch_id}").json()
        if batch["status"] in statuses:
            return batch
        assert time.monotonic() < deadline, batch
        time.sleep(0.02)


def lines_of(client: TestClient, file_id: str | None) -> list[Any]:
    if file_id is None:
        return []
    text = client.get(f"/v1/files/{file_id}/content").content
    return [json.loads(line) for line in text.splitlines()]


def test_every_line_is_answered_once_in_order(
    client: TestClient, inference: FakeInference, database: Database
) -> None:
    made = new_batch(client, [*LINES, b"", batch_line("bad", temperature=9)])
    batch = ended(client, made.json()["id"], "completed")
    assert batch["request_counts"] == {"total": 13, "completed": 12, "failed": 1}
    answers = lines_of(client, batch["output_file_id"])
    assert [answer["custom_id"] for answer in answers] == [line["custom_id"] for line in LINES]
    response = answers[0]["response"]
    assert response["status_code"] == 200
    assert response["request_id"].startswith("req_")
    assert response["body"]["choices"][0]["message"]["content"] == "Hello"
    [refused] = lines_of(client, batch["error_file_id"])
    assert (refused["custom_id"], refused["response"]["status_code"]) == ("bad", 400)
    assert refused["response"]["body"]["error"]["param"] == "temperature"
    assert len(inference.requests) == 12
    assert batch["usage"]["total_tokens"] == 12 * 9
    with database.read() as session:
        assert session.query(BatchResult).count() == 0  # they stand in the files


def test_answers_that_come_while_others_are_written_are_kept(
    client: TestClient, inference: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = batches._Run._flush

    def slow(run: batches._Run, taken: list[registry.Answer]) -> registry.Standing:
        deadline = time.monotonic() + 20
        while not run._ended.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
        return real(run, taken)

    monkeypatch.setattr(batches._Run, "_flush", slow)
    made = new_batch(client, LINES)
    batch = ended(client, made.json()["id"], "completed", "expired")
    assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (b'{"custom_id": "\\ud800"}', "invalid_json_line"),
        ({**LINES[1], "custom_id": ""}, "missing_required_parameter"),
        (LINES[0], "duplicate_custom_id"),
        ({**LINES[1], "method": "GET"}, "invalid_method"),
        ({**LINES[1], "url": "/v1/embeddings"}, "mismatched_endpoint"),
        ({**LINES[1], "body": None}, "missing_required_parameter"),
        (batch_line("x", stream=True), "invalid_value"),
    ],
)
def test_a_faulty_file_fails_with_the_line(
    client: TestClient, inference: FakeInference, line: Any, code: str
) -> None:
    made = new_batch(client, [LINES[0], line]).json()
    batch = ended(client, made["id"], "failed")
    [error] = batch["errors"]["data"]
    assert (error["code"], error["line"]) == (code, 2)
    assert inference.requests == []


def test_what_cannot_be_a_batch_is_refused(client: TestClient, database: Database) -> None:
    expect(new_batch(client, endpoint="/v1/responses"), 400, "endpoint", "invalid_value")
    expect(new_batch(client, completion_window="1h"), 400, "completion_window", "invalid_value")
    expect(new_batch(client, input_file_id="file-x"), 404, "input_file_id", "file_not_found")
    made = new_batch(client).json()
    other = client.get(f"/v1/batches/{made['id']}").json()["input_file_id"]
    with database.write() as session:
        session.execute(update(File).values(purpose="user_data"))
    answer = new_batch(client, input_file_id=other)
    expect(answer, 400, "input_file_id", "invalid_file_purpose")


def test_a_full_or_absent_server_only_delays(client: TestClient, inference: FakeInference) -> None:
    refusals = iter([CapacityError("full", retry_after=0), UnavailableError("gone", retry_after=0)])
    inference.refuse(next(refusals))
    made = new_batch(client).json()
    while len(inference.requests) < 1:
        time.sleep(0.01)
    inference.refuse(next(refusals))
    while len(inference.requests) < 3:
        time.sleep(0.01)
    inference.refusal = None
    assert ended(client, made["id"], "completed")["request_counts"]["completed"] == 1


def test_a_cancelled_batch_says_of_every_line_what_became_of_it(
    client: TestClient, inference: FakeInference
) -> None:
    inference.events = [*HELLO[:2], Hold()]
    made = new_batch(client, LINES).json()
    assert inference.holding.wait(20)
    busy = client.delete(f"/v1/files/{made['input_file_id']}")
    assert made["id"] in expect(busy, 400, "file_id", "file_in_use")
    assert client.post(f"/v1/batches/{made['id']}/cancel").json()["status"] == "cancelling"
    batch = ended(client, made["id"], "cancelled")
    assert inference.left.wait(20)
    told = lines_of(client, batch["error_file_id"])
    assert [each["error"]["code"] for each in told] == ["batch_cancelled"] * len(LINES)
    again = client.post(f"/v1/batches/{made['id']}/cancel")
    expect(again, 400, "batch_id", "batch_not_cancellable")


def test_the_window_ends_a_batch_that_is_not_whole(
    client: TestClient, inference: FakeInference, database: Database
) -> None:
    inference.refuse(UnavailableError("gone", retry_after=1))
    made = new_batch(client, LINES).json()
    ended(client, made["id"], "in_progress")
    with database.write() as session:
        session.execute(update(Batch).values(expires_at=db_now() - 1))
    batch = ended(client, made["id"], "expired")
    told = lines_of(client, batch["error_file_id"])
    assert {each["error"]["code"] for each in told} == {"batch_expired"}
    assert len(told) == len(LINES)


@contextmanager
def api_process(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Run an API that asks for one line at a time; it is killed at the end if it still runs."""
    environment = {
        "TUNERY_DATABASE__URL": settings.database.url,
        "TUNERY_STORAGE__URL": settings.storage.url,
        "TUNERY_BROKER__URL": settings.broker.url.get_secret_value(),
        "TUNERY_INFERENCE__TOKEN": settings.inference.token.get_secret_value(),
        "TUNERY_MODELS__CATALOG": json.dumps(settings.models.catalog),
        "TUNERY_API__PORT": "0",
        "TUNERY_API__BATCH_REQUESTS": "1",
        "TUNERY_LOG_LEVEL": "WARNING",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "api.cli", "api"], env=child_environment(environment)
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_leaves_its_batch_to_the_next(
    settings: Settings, database: Database
) -> None:
    """SIGKILL in the middle: no line that was kept is asked again, and none is left out."""
    idle = settings.model_copy(
        update={"api": settings.api.model_copy(update={"batch_requests": 0})}
    )
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "test")
    with running_fake() as fake, TestClient(create_app(idle)) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        with database.write() as session:
            server = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, server, 600)
        made = new_batch(client, LINES).json()
        with api_process(settings) as process:
            while len(fake.requests) < 5:
                time.sleep(0.005)
            fake.events = [*HELLO[:2], Hold()]
            assert fake.holding.wait(60)
            time.sleep(1)  # the answers so far are written twice a second
            process.send_signal(signal.SIGKILL)
            process.wait()
        with database.write() as session:
            kept = registry.done_lines(session, made["id"])
            session.execute(update(Batch).values(lease_until=db_now() - 1))
        assert 5 <= len(kept) < len(LINES)
        n_before = len(fake.requests)
        fake.events = list(HELLO)
        with api_process(settings):
            batch = ended(client, made["id"], "completed")
        asked = [str((request.messages or [])[0].content) for request in fake.requests[n_before:]]
        assert sorted(asked) == sorted(f"line {n}" for n in range(12) if n + 1 not in kept)
        told = lines_of(client, batch["output_file_id"])
        assert [each["custom_id"] for each in told] == [line["custom_id"] for line in LINES]
        assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
