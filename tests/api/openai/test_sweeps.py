"""A grid is a group of jobs: all or none, compared by the loss that they came to."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.cli.sweep_commands import parse_grid
from models.db import Database
from models.domain.reports import StepMetrics
from models.domain.status import JobStatus
from models.registry import job_runs, jobs, metrics
from tests.api.calls import expect, upload

GRID = {"peft.r": [4, 8], "optimizer.learning_rate": [0.001, 0.0002]}


def sweep(client: TestClient, **fields: Any) -> Any:
    job = {"model": "base", "training_file": upload(client).json()["id"]}
    return client.post("/v1/sweeps", json={"job": job, "grid": GRID, **fields})


def succeed(database: Database, job_id: str, loss: float) -> None:
    point = StepMetrics(
        step=1,
        epoch=1.0,
        train_loss=loss,
        train_mean_token_accuracy=0.5,
        learning_rate=0.1,
        grad_norm=1.0,
        tokens=1,
        trained_tokens=1,
        tokens_per_second=1.0,
    )
    with database.write() as session:
        jobs.move(session, job_id, JobStatus.QUEUED)
        jobs.move(session, job_id, JobStatus.RUNNING, attempt=1)
        metrics.record(session, job_id, 1, [point], 1)
        job_runs.succeed(session, job_id, 1, fine_tuned_model=f"ft:{job_id}")


def test_every_point_is_a_job_and_the_best_is_named(client: TestClient, database: Database) -> None:
    made = sweep(client, name="ranks").json()
    points = [row["point"] for row in made["jobs"]]
    assert [(p["peft.r"], p["optimizer.learning_rate"]) for p in points] == [
        (4, 0.001),
        (4, 0.0002),
        (8, 0.001),
        (8, 0.0002),
    ]
    job = client.get(f"/v1/fine_tuning/jobs/{made['jobs'][3]['job_id']}").json()
    assert (job["peft"]["r"], job["optimizer"]["learning_rate"]) == (8, 0.0002)
    for row, loss in zip(made["jobs"][:3], (0.5, 0.2, 0.9), strict=True):
        succeed(database, row["job_id"], loss)
    path = f"/v1/sweeps/{made['id']}"
    assert client.get(path).json()["status"] == "running"
    ended = client.post(f"{path}/cancel").json()
    assert ended["status"] == "ended"
    assert [row["status"] for row in ended["jobs"]] == ["succeeded"] * 3 + ["cancelled"]
    assert ended["best_job_id"] == made["jobs"][1]["job_id"]
    assert [each["id"] for each in client.get("/v1/sweeps").json()["data"]] == [made["id"]]


@pytest.mark.parametrize(
    ("grid", "param"),
    [
        ({"peft.r": [8, -1]}, "peft.r"),
        ({"pefd.r": [8]}, "pefd"),
        ({"model.x": [1]}, "grid.model.x"),
        ({"seed": list(range(60)), "peft.r": [4, 8]}, "grid"),
        ({}, "grid"),
        ({"seed": []}, "grid.seed"),
    ],
)
def test_a_grid_with_one_bad_point_makes_no_job(
    client: TestClient, grid: dict[str, Any], param: str
) -> None:
    answer = sweep(client, grid=grid)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []
    assert client.get("/v1/sweeps").json()["data"] == []
    missing = client.get("/v1/sweeps/sweep_x")
    expect(missing, 404, "sweep_id", "sweep_not_found")


def test_values_of_the_command_line_are_json_or_text() -> None:
    assert parse_grid(["peft.r=4,8", "optimizer.schedule=linear"]) == {
        "peft.r": [4, 8],
        "optimizer.schedule": ["linear"],
    }
