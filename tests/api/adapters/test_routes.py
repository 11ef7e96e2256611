"""``/v1/adapters``: what a model came from, what came of it, and nothing of other projects."""

import pytest
from fastapi.testclient import TestClient

from models.db import Database
from models.domain.reports import StepMetrics
from models.registry import adapters, metrics, tenancy
from models.tables import Adapter, Checkpoint, Project
from tests.api.calls import expect, new_job, upload

URL = "/v1/adapters"
FIRST = "ft:base:local:first:abcdefgh"
SECOND = "ft:base:local:second:abcdefgh"
STEP = 5
MANIFEST = {
    "base_fingerprint": "f" * 64,
    "method": "lora",
    "objective": "sft",
    "precision": {"type": "nf4"},
    "step": STEP,
    "versions": {"torch": "2.11.0"},
}


def publish(database: Database, job_id: str, name: str) -> None:
    with database.write() as session:
        point = StepMetrics(
            step=STEP,
            epoch=1.0,
            train_loss=0.5,
            train_mean_token_accuracy=0.9,
            learning_rate=1e-4,
            grad_norm=1.0,
            tokens=10,
            trained_tokens=5,
            tokens_per_second=100.0,
        )
        metrics.record(session, job_id, 1, [point], STEP)
        adapter = Adapter(
            name=name,
            project_id=tenancy.default_project(session).id,
            job_id=job_id,
            base_model="base",
            digest=name[-64:].rjust(64, "d"),
            bytes=7,
            manifest=MANIFEST,
        )
        adapters.publish(session, adapter)


@pytest.fixture
def two(client: TestClient, database: Database) -> tuple[str, str]:
    """An adapter on the base and one that goes on from it; the ids of their jobs."""
    first = new_job(client).json()["id"]
    publish(database, first, FIRST)
    second = new_job(client, model=FIRST).json()["id"]
    publish(database, second, SECOND)
    return first, second


def test_adapters_are_listed_newest_first_in_pages(
    client: TestClient, two: tuple[str, str]
) -> None:
    first = client.get(URL, params={"limit": 1}).json()
    assert [each["id"] for each in first["data"]] == [SECOND]
    assert first["has_more"]
    rest = client.get(URL, params={"after": first["last_id"]}).json()
    assert [each["id"] for each in rest["data"]] == [FIRST]
    assert not rest["has_more"]
    assert (rest["data"][0]["method"], rest["data"][0]["step"]) == ("lora", STEP)


def test_a_card_tells_every_job_and_file_back_to_the_base(
    client: TestClient, two: tuple[str, str]
) -> None:
    card = client.get(f"{URL}/{SECOND}").json()
    assert [(each["model"], each["job_id"]) for each in card["lineage"]] == [
        (SECOND, two[1]),
        (FIRST, two[0]),
    ]
    assert [each["training_filename"] for each in card["lineage"]] == ["rows.jsonl"] * 2
    assert (card["root"], card["step"], card["metrics"]["train_loss"]) == ("base", STEP, 0.5)
    assert card["successors"] == []


def test_a_card_tells_which_jobs_went_on_from_the_model(
    client: TestClient, two: tuple[str, str]
) -> None:
    (found,) = client.get(f"{URL}/{FIRST}").json()["successors"]
    assert found["job_id"] == two[1]


def test_a_deleted_ancestor_is_still_named(client: TestClient, two: tuple[str, str]) -> None:
    client.delete(f"/v1/models/{FIRST}")
    own, ancestor = client.get(f"{URL}/{SECOND}").json()["lineage"]
    assert (own["deleted"], ancestor["deleted"]) == (False, True)
    assert ancestor["job_id"] == two[0]
    expect(client.get(f"{URL}/{FIRST}"), 404, "model", "model_not_found")


def test_a_checkpoint_has_a_card_and_its_successors_outlive_it(
    client: TestClient, database: Database
) -> None:
    job_id = new_job(client).json()["id"]
    name = f"ft:base:local::x:ckpt-step-{STEP}"
    with database.write() as session:
        session.add(
            Checkpoint(
                id="ftckpt_1",
                job_id=job_id,
                attempt=1,
                step=STEP,
                name=name,
                object_prefix="checkpoints/x",
                adapter_digest="d" * 64,
                base_fingerprint="f" * 64,
                metrics={"step": STEP, "train_loss": 0.5},
            )
        )
    card = client.get(f"{URL}/{name}").json()
    assert (card["is_checkpoint"], card["step"], card["bytes"]) == (True, STEP, None)
    later = new_job(client, model=name).json()["id"]
    publish(database, later, SECOND)
    with database.write() as session:
        session.delete(session.get_one(Checkpoint, "ftckpt_1"))
    _, gone = client.get(f"{URL}/{SECOND}").json()["lineage"]
    assert (gone["model"], gone["job_id"], gone["deleted"]) == (name, None, True)


def test_a_deleted_file_leaves_its_id(client: TestClient, database: Database) -> None:
    file_id = upload(client, b'{"messages": []}\n').json()["id"]
    job_id = new_job(client, training_file=file_id).json()["id"]
    publish(database, job_id, FIRST)
    client.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    assert client.delete(f"/v1/files/{file_id}").json()["deleted"]
    (own,) = client.get(f"{URL}/{FIRST}").json()["lineage"]
    assert (own["training_file"], own["training_filename"]) == (file_id, None)


def test_a_base_model_is_no_adapter(client: TestClient) -> None:
    message = expect(client.get(f"{URL}/base"), 400, "model", "model_not_fine_tuned")
    assert "/v1/models" in message


def test_adapters_of_another_project_are_not_shown(
    client: TestClient, database: Database, two: tuple[str, str]
) -> None:
    with database.write() as session:
        session.add(Project(id="proj_other", name="other"))
        session.flush()
        _, foreign = tenancy.create_key(session, "proj_other", "foreign")
    client.headers["authorization"] = f"Bearer {foreign}"
    assert client.get(URL).json()["data"] == []
    expect(client.get(f"{URL}/{SECOND}"), 404, "model", "model_not_found")
