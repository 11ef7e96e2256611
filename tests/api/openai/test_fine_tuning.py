"""``/v1/fine_tuning/jobs``: what is refused changes nothing, what is taken can be followed."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.job_differences import differences
from models.db import Database
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry import jobs, tenancy
from models.tables import Checkpoint, Job, Project
from tests.api.calls import expect, new_job, upload

URL = "/v1/fine_tuning/jobs"


def ids(client: TestClient, **query: Any) -> list[str]:
    return [job["id"] for job in client.get(URL, params=query).json()["data"]]


def test_a_job_is_created_while_the_broker_is_down(client: TestClient) -> None:
    response = new_job(client, metadata={"team": "a"}, suffix="s", seed=3)
    job = response.json()
    assert response.status_code == 200, job
    assert (job["status"], job["object"]) == ("validating_files", "fine_tuning.job")
    assert (job["model"], job["seed"], job["user_provided_suffix"]) == ("base", 3, "s")
    assert (job["metadata"], job["result_files"], job["error"]) == ({"team": "a"}, [], None)
    assert job["peft"]["type"] == "lora"
    assert job["precision"] == {"type": "nf4", "double_quant": True}
    assert client.get(f"{URL}/{job['id']}").json() == job


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({"model": "gpt-4"}, "model", "model_not_found", "Base models here: base"),
        ({"model": "a\u0000b"}, "model", "invalid_value", "NUL"),
        ({"model": None}, "model", "invalid_value", "string"),
        ({"training_file": None}, "training_file", "invalid_value", "string"),
        ({"sufix": "x"}, "sufix", "unknown_parameter", "Did you mean 'suffix'"),
        ({"suffix": "a:b"}, "suffix", "invalid_value", "pattern"),
        ({"suffix": "x" * 65}, "suffix", "invalid_value", "pattern"),
        ({"suffix": "a/b"}, "suffix", "invalid_value", "pattern"),
        ({"suffix": "ok\n"}, "suffix", "invalid_value", "pattern"),
        ({"seed": 2**31}, "seed", "invalid_value", "less than"),
        ({"seed": 2**70}, "seed", "invalid_value", "integer"),
        ({"seed": -1}, "seed", "invalid_value", "greater"),
        ({"seed": True}, "seed", "invalid_value", "integer"),
        ({"metadata": {"k" * 65: "v"}}, "metadata", "invalid_value", "64"),
        ({"metadata": {"k": "v" * 513}}, "metadata", "invalid_value", "512"),
        ({"metadata": {str(i): "v" for i in range(17)}}, "metadata", "invalid_value", "17"),
        ({"metadata": {"k": 1}}, "metadata.k", "invalid_value", "string"),
        ({"metadata": {"k": "\u0000"}}, "metadata.k", "invalid_value", "NUL"),
        ({"peft": {"type": "lora", "r": 0}}, "peft.r", "invalid_value", "greater"),
        ({"peft": {"rank": 8}}, "peft.rank", "unknown_parameter", "Unknown field"),
        ({"precision": {"type": "int3"}}, "precision.type", "invalid_value", "nf4"),
        ({"method": {"type": "reinforcement"}}, "method.type", "invalid_value", "supervised"),
        ({"integrations": [{"type": "wandb"}]}, "integrations", "invalid_value", "at most 0"),
        ({"num_devices": 0}, "num_devices", "invalid_value", "greater"),
        ({"num_devices": 2}, "num_devices", "devices_unavailable", "at most 1"),
    ],
)
def test_a_bad_field_names_itself_and_no_job_is_made(
    client: TestClient, fields: dict[str, Any], param: str, code: str, words: str
) -> None:
    assert words in expect(new_job(client, **fields), 400, param, code)
    assert ids(client) == []


@pytest.mark.parametrize("field", ["model", "training_file"])
def test_a_missing_field_is_named(client: TestClient, field: str) -> None:
    body = {"model": "base", "training_file": "file-x"}
    del body[field]
    expect(client.post(URL, json=body), 400, field, "missing_required_parameter")


def test_a_lone_surrogate_is_400(client: TestClient) -> None:
    body = b'{"model": "base", "training_file": "file-x", "suffix": "\\ud800"}'
    response = client.post(URL, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert sorted(response.json()["error"]) == ["code", "message", "param", "type"]


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_a_file_that_cannot_be_trained_on_is_refused(client: TestClient, param: str) -> None:
    other = upload(client, purpose="user_data").json()["id"]
    message = expect(new_job(client, **{param: other}), 400, param, "invalid_file_purpose")
    assert "'user_data'" in message
    expect(new_job(client, **{param: "file-x"}), 404, param, "file_not_found")
    assert ids(client) == []


def test_jobs_and_files_of_another_project_do_not_exist(
    client: TestClient, database: Database
) -> None:
    job = new_job(client).json()
    with database.write() as session:
        session.add(Project(id="proj_other", name="other"))
        session.flush()
        _, foreign = tenancy.create_key(session, "proj_other", "foreign")
    client.headers["authorization"] = f"Bearer {foreign}"
    for method, path in (
        ("GET", ""),
        ("POST", "/cancel"),
        ("GET", "/events"),
        ("GET", "/checkpoints"),
    ):
        response = client.request(method, f"{URL}/{job['id']}{path}")
        expect(response, 404, "fine_tuning_job_id", "fine_tuning_job_not_found")
    assert ids(client) == []
    theirs = new_job(client, training_file=job["training_file"])
    expect(theirs, 404, "training_file", "file_not_found")
    with database.read() as session:
        assert session.get_one(Job, job["id"]).status == "validating_files"


def test_a_waiting_job_is_cancelled_once(client: TestClient) -> None:
    path = f"{URL}/{new_job(client).json()['id']}/cancel"
    headers = {"content-type": "application/json"}  # as the SDK sends it: a type and no body
    cancelled = client.post(path, headers=headers).json()
    assert cancelled["status"] == "cancelled"
    assert cancelled["finished_at"] >= cancelled["created_at"]
    message = expect(client.post(path), 400, "fine_tuning_job_id", "job_not_cancellable")
    assert "already ended with status 'cancelled'" in message


def test_a_running_job_is_asked_to_stop_once_and_a_finished_one_never(
    client: TestClient, database: Database
) -> None:
    job_id = new_job(client).json()["id"]
    with database.write() as session:
        assert jobs.move(session, job_id, JobStatus.QUEUED)
        assert jobs.move(session, job_id, JobStatus.RUNNING)
    path = f"{URL}/{job_id}/cancel"
    asked = client.post(path).json()
    assert (asked["status"], asked["cancel_requested"]) == ("running", True)
    expect(client.post(path), 400, "fine_tuning_job_id", "job_not_cancellable")
    with database.write() as session:
        assert jobs.move(session, job_id, JobStatus.SUCCEEDED)
    message = expect(client.post(path), 400, "fine_tuning_job_id", "job_not_cancellable")
    assert "'succeeded'" in message
    assert client.get(f"{URL}/{job_id}").json()["status"] == "succeeded"


def test_a_job_is_paused_and_resumed_by_its_owner_alone(
    client: TestClient, database: Database
) -> None:
    job_id = new_job(client).json()["id"]
    asked = client.post(f"{URL}/{job_id}/pause").json()
    assert (asked["status"], asked["pause_requested"]) == ("validating_files", True)
    again = client.post(f"{URL}/{job_id}/resume").json()
    assert (again["status"], again["pause_requested"]) == ("validating_files", False)
    expect(client.post(f"{URL}/{job_id}/resume"), 400, "fine_tuning_job_id", "job_not_resumable")
    with database.write() as session:
        assert jobs.move(session, job_id, JobStatus.QUEUED)
    assert client.post(f"{URL}/{job_id}/pause").json()["status"] == "paused"
    resumed = client.post(f"{URL}/{job_id}/resume").json()
    assert (resumed["status"], resumed["queue_position"], resumed["queue_length"]) == (
        "queued",
        1,
        1,
    )
    assert client.get(f"{URL}/{job_id}").json() == resumed
    assert client.get(URL).json()["data"] == [resumed]
    client.post(f"{URL}/{job_id}/cancel")
    expect(client.post(f"{URL}/{job_id}/pause"), 400, "fine_tuning_job_id", "job_not_pausable")


def test_jobs_are_paged_newest_first(client: TestClient) -> None:
    made = [new_job(client).json()["id"] for _ in range(3)]
    first = client.get(URL, params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == made[:0:-1]
    assert (first["first_id"], first["last_id"]) == (made[2], made[1])
    assert first["has_more"]
    second = client.get(URL, params={"limit": 2, "after": first["last_id"]}).json()
    assert [job["id"] for job in second["data"]] == [made[0]]
    assert not second["has_more"]
    for query, param in (("after=ftjob-x", "after"), ("limit=101", "limit")):
        expect(client.get(f"{URL}?{query}"), 400, param, "invalid_value")


def test_jobs_are_found_by_all_pairs_of_their_metadata(client: TestClient) -> None:
    both = new_job(client, metadata={"team": "a", "x.y": 'q"'}).json()["id"]
    one = new_job(client, metadata={"team": "a"}).json()["id"]
    none = new_job(client).json()["id"]
    assert ids(client, **{"metadata[team]": "a"}) == [one, both]
    assert ids(client, **{"metadata[team]": "a", "metadata[x.y]": 'q"'}) == [both]
    assert ids(client, **{"metadata[team]": "b"}) == []
    assert ids(client, **{"metadata[$.team]": "a"}) == []
    assert ids(client, metadata="null") == [none]
    expect(client.get(URL, params={"metadata": "a"}), 400, "metadata", "invalid_value")


def test_events_are_paged_newest_first(client: TestClient) -> None:
    path = f"{URL}/{new_job(client).json()['id']}/events"
    events = client.get(path).json()["data"]
    assert [event["sequence"] for event in events] == [2, 1]
    assert "Created fine-tuning job" in events[1]["message"]
    assert {event["object"] for event in events} == {"fine_tuning.job.event"}
    first = client.get(path, params={"limit": 1}).json()
    assert first["has_more"]
    rest = client.get(path, params={"limit": 1, "after": first["last_id"]}).json()
    assert (rest["data"], rest["has_more"]) == (events[1:], False)
    expect(client.get(path, params={"after": "x"}), 400, "after", "invalid_value")


def test_checkpoints_show_openais_metrics_and_no_others(
    client: TestClient, database: Database
) -> None:
    job_id = new_job(client).json()["id"]
    path = f"{URL}/{job_id}/checkpoints"
    assert client.get(path).json()["data"] == []
    with database.write() as session:
        session.add(
            Checkpoint(
                id="ftckpt_1",
                job_id=job_id,
                attempt=1,
                step=5,
                name="ft:base:local::abc:ckpt-step-5",
                object_prefix="checkpoints/x",
                adapter_digest="d" * 64,
                base_fingerprint="f" * 64,
                metrics={"step": 5, "train_loss": 0.5, "gpu": 1},
            )
        )
    (checkpoint,) = client.get(path).json()["data"]
    assert checkpoint["object"] == "fine_tuning.job.checkpoint"
    assert (checkpoint["step_number"], checkpoint["fine_tuning_job_id"]) == (5, job_id)
    assert checkpoint["metrics"] == {"step": 5, "train_loss": 0.5}
    name = checkpoint["fine_tuned_model_checkpoint"]
    assert client.get(f"/v1/models/{name}").json()["root"] == "base"
    expect(client.delete(f"/v1/models/{name}"), 400, "model", "model_not_deletable")


def test_a_job_goes_on_from_a_checkpoint_with_its_method_and_precision(
    client: TestClient, database: Database
) -> None:
    peft = {"type": "lora", "r": 4, "alpha": 8.0}
    first = new_job(client, peft=peft, precision={"type": "bf16"}).json()
    name = "ft:base:local::abc:ckpt-step-5"
    with database.write() as session:
        session.add(
            Checkpoint(
                id="ftckpt_1",
                job_id=first["id"],
                attempt=1,
                step=5,
                name=name,
                object_prefix="checkpoints/x",
                adapter_digest="d" * 64,
                base_fingerprint="f" * 64,
                metrics={"step": 5},
            )
        )
    job = new_job(client, model=name, peft={"dropout": 0.2}).json()
    assert (job["model"], job["base_model"]) == (name, "base")
    assert job["peft"] == first["peft"] | {"dropout": 0.2}
    assert job["precision"] == first["precision"]
    with database.read() as session:
        spec = TrainingSpec.model_validate(session.get_one(Job, job["id"]).spec)
    assert spec.init_adapter is not None
    assert (spec.init_adapter.digest, spec.init_adapter.name) == ("d" * 64, name)
    other = new_job(client, model=name, peft={"r": 8})
    assert "cannot change" in expect(other, 400, "peft.r", "invalid_value")
    unknown = new_job(client, model="ft:base:local::nothing1")
    expect(unknown, 404, "model", "model_not_found")


def test_a_rerun_is_the_same_job_with_the_numbers_that_auto_became(
    client: TestClient, database: Database
) -> None:
    first = new_job(client, metadata={"team": "a"}, suffix="s").json()
    with database.write() as session:
        job = session.get_one(Job, first["id"])
        job.spec = TrainingSpec.model_validate(job.spec).resolved(80, 10).model_dump(mode="json")
    again = client.post(f"{URL}/{first['id']}/rerun").json()
    assert again["id"] != first["id"]
    assert again["status"] == "validating_files"
    expected = client.get(f"{URL}/{first['id']}").json()
    assert differences([expected, again]) == []
    assert again["hyperparameters"]["batch_size"] == 8
    messages = [
        event["message"] for event in client.get(f"{URL}/{again['id']}/events").json()["data"]
    ]
    assert f"Rerun of job {first['id']}" in messages


def test_a_rerun_without_its_file_says_so(client: TestClient, database: Database) -> None:
    job = new_job(client).json()
    client.post(f"{URL}/{job['id']}/cancel")
    assert client.delete(f"/v1/files/{job['training_file']}").is_success
    expect(client.post(f"{URL}/{job['id']}/rerun"), 404, "training_file", "file_not_found")
    expect(
        client.post(f"{URL}/ftjob-nothing/rerun"),
        404,
        "fine_tuning_job_id",
        "fine_tuning_job_not_found",
    )
