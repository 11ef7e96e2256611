"""An adapter that is wanted merged: who may say so, what is refused, what the server is told."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from models.db import Database
from models.domain.generation import AdapterRef
from models.registry import adapters, permissions, tenancy
from models.tables import Adapter, BaseModel, Job
from tests.api.adapters.test_routes import FIRST, publish
from tests.api.calls import chat, expect, new_job
from tests.api.fake_inference import FakeInference

URL = "/v1/adapters"


@pytest.fixture
def model(client: TestClient, database: Database) -> str:
    publish(database, new_job(client).json()["id"], FIRST)
    return FIRST


def serve(client: TestClient, name: str, merged: object = True) -> Any:
    return client.post(f"{URL}/{name}/serve", json={"merged": merged})


def trained_with(database: Database, peft: dict[str, Any], **manifest: str) -> None:
    """Have the job of `model` trained by another method."""
    with database.write() as session:
        adapter = session.get_one(Adapter, FIRST)
        job = session.get_one(Job, adapter.job_id)
        job.spec = {**job.spec, "peft": peft}
        adapter.manifest = {**adapter.manifest, "method": peft["type"], **manifest}


def asked_merged(client: TestClient, inference: FakeInference) -> bool:
    """Ask the model; return whether the server was told that it is wanted merged."""
    assert chat(client, model=FIRST).status_code == 200
    reference = inference.requests[-1].adapter
    assert reference is not None
    return reference.merged


def test_the_server_is_told_what_the_owner_wants_and_the_card_and_the_log_tell_it(
    client: TestClient, inference: FakeInference, model: str
) -> None:
    card = client.get(f"{URL}/{model}").json()
    assert (card["merged"], card["can_choose_merged"]) == (False, True)
    assert not asked_merged(client, inference)
    answer = serve(client, model)
    assert (answer.status_code, answer.json()["merged"]) == (200, True)
    assert serve(client, model).json() == answer.json()
    assert client.get(f"{URL}/{model}").json()["merged"]
    assert [each["merged"] for each in client.get(URL).json()["data"]] == [True]
    assert asked_merged(client, inference)
    assert serve(client, model, False).json()["merged"] is False
    assert not asked_merged(client, inference)
    changes = [
        each["model.serving_updated"]
        for each in client.get("/v1/audit_logs").json()["data"]
        if each["type"] == "model.serving_updated"
    ]
    assert changes == [
        {"id": model, "data": {"merged": False}},
        {"id": model, "data": {"merged": True}},
    ]


def test_how_it_is_answered_is_no_part_of_a_job_that_goes_on_from_it(
    client: TestClient, database: Database, model: str
) -> None:
    serve(client, model)
    job_id = new_job(client, model=model).json()["id"]
    with database.read() as session:
        start = session.get_one(Job, job_id).spec["init_adapter"]
    assert set(start) == {"name", "digest", "base_model", "base_fingerprint"}
    reference = AdapterRef.model_validate(start)
    assert not reference.merged
    wanted = reference.model_copy(update={"merged": True})
    assert AdapterRef.model_validate_json(wanted.model_dump_json()) == wanted


@pytest.mark.parametrize(
    "peft",
    [
        {"type": "houlsby"},
        {"type": "meft"},
        {"type": "prompt"},
        {"type": "prefix"},
        {"type": "adamix", "over": "houlsby"},
    ],
    ids=lambda peft: str(peft["type"]),
)
def test_what_cannot_be_merged_is_refused_with_the_reason(
    client: TestClient, database: Database, model: str, peft: dict[str, Any]
) -> None:
    trained_with(database, peft)
    message = expect(serve(client, model), 400, "merged", "not_mergeable")
    assert "no change of the base's weights" in message
    assert not client.get(f"{URL}/{model}").json()["can_choose_merged"]
    assert serve(client, model, False).status_code == 200
    # Nor as a file, for which a worker would have tried it.
    expect(client.post(f"{URL}/{model}/merge"), 400, "model", "not_mergeable")


def test_what_is_always_merged_cannot_be_turned_back(
    client: TestClient, database: Database, model: str
) -> None:
    trained_with(database, {"type": "vera"}, served="merged")
    assert serve(client, model).json()["merged"]
    message = expect(serve(client, model, False), 400, "merged", "always_merged")
    assert "VeRA" in message
    card = client.get(f"{URL}/{model}").json()
    assert (card["merged"], card["can_choose_merged"]) == (True, False)


def test_neither_bases_nor_encoders_nor_other_values_are_taken(
    client: TestClient, database: Database, model: str
) -> None:
    expect(serve(client, "base"), 400, "model", "not_mergeable")
    expect(serve(client, "ft:x"), 404, "model", "model_not_found")
    expect(serve(client, model, "yes"), 400, "merged", "invalid_value")
    shape = {"layers": {}, "n_other": 1, "family": "encoder"}
    with database.write() as session:
        session.execute(update(BaseModel).values(shape=shape))
    expect(serve(client, model), 400, "merged", "not_mergeable")


def test_who_may_call_it_by_permission_is_answered_merged_and_cannot_change_that(
    client: TestClient, database: Database, inference: FakeInference, model: str
) -> None:
    serve(client, model)
    with database.write() as session:
        other = tenancy.create_project(session, "other")
        _, secret = tenancy.create_key(session, other.id, "theirs")
        permissions.grant(session, tenancy.default_project(session).id, model, [other.id])
    client.headers["authorization"] = f"Bearer {secret}"
    assert asked_merged(client, inference)
    expect(serve(client, model, False), 404, "model", "model_not_found")
    with database.read() as session:
        found = adapters.resolve(session, other.id, model).adapter
    assert found is not None
    assert found.merged
