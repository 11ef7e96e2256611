"""``/v1/adapters``: what a model came from, what came of it, and nothing of other projects."""

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from models.db import Database
from models.domain.limits import ProjectLimits
from models.domain.reports import StepMetrics
from models.registry import adapters, merges, metrics, tenancy
from models.tables import Adapter, BaseModel, Checkpoint, Project
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


def test_a_merge_is_asked_for_once_and_again_when_it_failed_or_its_file_is_gone(
    client: TestClient, database: Database, two: tuple[str, str]
) -> None:
    url = f"{URL}/{FIRST}/merge"
    expect(client.get(url), 404, "model", "no_merge")
    asked = client.post(url).json()
    assert (asked["object"], asked["model"], asked["status"]) == ("adapter.merge", FIRST, "queued")
    assert client.post(url).json() == client.get(url).json() == asked
    with database.write() as session:
        merge = merges.claim(session, 60)
        assert merge is not None
        assert merges.claim(session, 60) is None
        merges.fail(session, merge.id, "It does not fit.")
        merges.succeed(session, merge.id, "file-x")  # too late
    ended = client.get(url).json()
    assert (ended["status"], ended["error"], ended["file_id"]) == (
        "failed",
        "It does not fit.",
        None,
    )
    again = client.post(url).json()
    assert again["id"] != asked["id"]
    file_id = upload(client, purpose="user_data").json()["id"]
    with database.write() as session:
        merge = merges.claim(session, 60)
        assert merge is not None
        merges.give_back(session, merge.id)
        merge = merges.claim(session, 60)
        assert merge is not None
        merges.succeed(session, merge.id, file_id)
    assert client.post(url).json()["file_id"] == file_id
    client.delete(f"/v1/files/{file_id}")
    assert client.post(url).json()["status"] == "queued"
    (entry, *_) = client.get("/v1/audit_logs").json()["data"]
    assert entry["type"] == "model.merge_requested"


def test_what_cannot_be_merged_or_has_no_room_is_refused(
    client: TestClient, database: Database, two: tuple[str, str]
) -> None:
    expect(client.post(f"{URL}/base/merge"), 400, "model", "not_mergeable")
    expect(client.post(f"{URL}/ft:x/merge"), 404, "model", "model_not_found")
    with database.write() as session:
        session.execute(update(BaseModel).values(n_parameters=1000))
        adapter = session.get_one(Adapter, SECOND)
        adapter.manifest = {**adapter.manifest, "served": "own"}
        limits = ProjectLimits(max_bytes=1999)
        tenancy.set_limits(session, tenancy.default_project(session), limits)
    refused = client.post(f"{URL}/{SECOND}/merge")
    assert "Download" in expect(refused, 400, "model", "not_mergeable")
    expect(client.post(f"{URL}/{FIRST}/merge"), 413, "file", "quota_exceeded")
    expect(client.get(f"{URL}/{FIRST}/merge"), 404, "model", "no_merge")
