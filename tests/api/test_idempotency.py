"""``Idempotency-Key``: a repeated POST takes effect once, on both databases."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import func, select, update

from api.app import create_app
from api.cli.migrate import upgrade
from models.db import Database
from models.registry import idempotency, tenancy
from models.settings import DatabaseSettings, Settings
from models.tables import IdempotencyKey, Job
from tests.api.calls import expect, upload
from tests.api.fake_inference import serving

N_CALLERS = 100
JOBS = "/v1/fine_tuning/jobs"
KEY = {"idempotency-key": "3f0c"}


@pytest.fixture(params=["sqlite", "postgresql"])
def settings(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    if request.param == "sqlite":
        return settings
    url = request.getfixturevalue("postgres_url")
    upgrade(url)
    return settings.model_copy(update={"database": DatabaseSettings(url=url)})


def body_of(client: TestClient, **fields: Any) -> dict[str, Any]:
    return {"model": "base", "training_file": upload(client).json()["id"], **fields}


def n_jobs(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def test_a_repeated_post_gets_the_first_answer_and_makes_nothing(
    client: TestClient, database: Database
) -> None:
    body = body_of(client)
    first = client.post(JOBS, json=body, headers=KEY)
    again = client.post(JOBS, json=body, headers=KEY)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert n_jobs(database) == 1
    other = client.post(JOBS, json=body, headers={"idempotency-key": "other"})
    assert other.json()["id"] != first.json()["id"]


def test_concurrent_identical_posts_make_one_job(settings: Settings, database: Database) -> None:
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "test")
    headers = {"authorization": f"Bearer {secret}"}
    with (
        serving(create_app(settings), lifespan="on") as url,
        httpx2.Client(base_url=url, headers=headers, timeout=60) as http,
        ThreadPoolExecutor(N_CALLERS) as pool,
    ):
        file = http.post(
            "/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"}
        ).json()
        body = {"model": "base", "training_file": file["id"]}
        calls = [pool.submit(http.post, JOBS, json=body, headers=KEY) for _ in range(N_CALLERS)]
        answers = [call.result() for call in calls]
    made = {answer.json()["id"] for answer in answers if answer.status_code == 200}
    assert len(made) == 1
    assert n_jobs(database) == 1
    for answer in answers:
        if answer.status_code != 200:
            expect(answer, 409, "Idempotency-Key", "idempotency_key_in_use")
            assert answer.headers["retry-after"] == "1"
            assert "x-should-retry" not in answer.headers  # the SDK may well try again


def test_a_key_of_another_request_is_422(client: TestClient) -> None:
    body = body_of(client)
    assert client.post(JOBS, json=body, headers=KEY).status_code == 200
    changed = client.post(JOBS, json=body | {"seed": 1}, headers=KEY)
    expect(changed, 422, "Idempotency-Key", "idempotency_key_reused")
    elsewhere = client.post("/v1/api_keys", json=body, headers=KEY)
    expect(elsewhere, 422, "Idempotency-Key", "idempotency_key_reused")


def test_errors_of_the_request_are_repeated_too(client: TestClient, database: Database) -> None:
    body = body_of(client, model="nothing")
    first = client.post(JOBS, json=body, headers=KEY)
    again = client.post(JOBS, json=body, headers=KEY)
    expect(first, 400, "model", "model_not_found")
    expect(again, 400, "model", "model_not_found")
    assert again.headers["idempotent-replayed"] == "true"


def test_what_the_service_could_not_do_is_tried_again(client: TestClient) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}
    for _ in range(2):  # there is no inference server
        answer = client.post("/v1/chat/completions", json=body, headers=KEY)
        assert answer.status_code == 503
        assert "idempotent-replayed" not in answer.headers


def test_an_upload_is_repeated_although_its_boundary_changes(client: TestClient) -> None:
    def send() -> httpx2.Response:
        file = {"file": ("a.jsonl", b"{}")}
        return client.post("/v1/files", files=file, data={"purpose": "user_data"}, headers=KEY)

    assert send().json() == send().json()
    assert len(client.get("/v1/files").json()["data"]) == 1


def test_a_claim_that_nobody_answers_is_never_carried_out_again(
    client: TestClient, database: Database
) -> None:
    """As after the death of the process: whether the request took effect is unknown."""
    body = body_of(client)
    assert client.post(JOBS, json=body, headers=KEY).status_code == 200
    with database.write() as session:
        session.execute(update(IdempotencyKey).values(status=None, body=None))
    again = client.post(JOBS, json=body, headers=KEY)
    expect(again, 409, "Idempotency-Key", "idempotency_key_in_use")
    with database.write() as session:
        old = IdempotencyKey.created_at - idempotency.KEPT_SECONDS
        session.execute(update(IdempotencyKey).values(created_at=old))
    assert client.post(JOBS, json=body, headers=KEY).status_code == 200
    assert n_jobs(database) == 2


def test_keys_of_projects_do_not_meet(client: TestClient) -> None:
    made = client.post("/v1/projects", json={"name": "team"}, headers=KEY).json()
    theirs = {"authorization": f"Bearer {made['api_key']['value']}"}
    answer = client.post("/v1/api_keys", json={"name": "ci"}, headers=KEY | theirs)
    assert answer.status_code == 200
    assert "idempotent-replayed" not in answer.headers


@pytest.mark.parametrize("key", ["", "a b", "x" * 256])
def test_an_unusable_key_is_refused(client: TestClient, key: str) -> None:
    answer = client.post(JOBS, json={}, headers={"idempotency-key": key})
    expect(answer, 400, "Idempotency-Key", "invalid_value")


def test_without_a_valid_bearer_key_nothing_is_claimed(
    client: TestClient, database: Database
) -> None:
    headers = KEY | {"authorization": "Bearer nonsense"}
    expect(client.post(JOBS, json={}, headers=headers), 401, None, "invalid_api_key")
    with database.read() as session:
        assert session.scalars(select(IdempotencyKey)).all() == []


def test_a_body_that_is_too_large_is_still_413(client: TestClient) -> None:
    large = b"x" * (5 * 1024 * 1024)
    answer = client.post(JOBS, content=large, headers=KEY)
    assert answer.status_code == 413
