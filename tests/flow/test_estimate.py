"""An estimate over the SDK, from the first wish for it to the job that it was about."""

from pathlib import Path
from typing import Any

import openai

from tests.flow.conftest import Up, first_rows, wait_until


def test_a_job_is_estimated_then_run_then_learned_from(up: Up, tmp_path: Path) -> None:
    client = up.client()
    data = first_rows(tmp_path / "rows.jsonl", 16)
    file = client.files.create(file=data, purpose="fine-tune")
    body = {
        "model": "smollm2-135m-instruct",
        "training_file": file.id,
        "hyperparameters": {"n_epochs": 1, "batch_size": 4},
        "validation_split": 0.25,
    }
    found: dict[str, Any] = {}

    def is_there() -> bool:
        try:
            found.update(client.post("/fine_tuning/estimate", cast_to=dict[str, Any], body=body))
        except openai.APIStatusError as error:
            if error.code not in ("file_not_linted", "not_measured_yet"):
                raise
        return bool(found)

    wait_until(is_there, 240, "an estimate")
    assert (found["n_rows"], found["total_steps"]) == (12, 3)
    assert found["trainable_parameters"] == 4_884_480
    assert found["peak_bytes"] == sum(found["memory"].values())
    assert found["seconds_band"]["low"] < found["seconds"] < found["seconds_band"]["high"]
    job = client.post("/fine_tuning/jobs", cast_to=dict[str, Any], body=body)

    def has_ended() -> bool:
        job.update(client.get(f"/fine_tuning/jobs/{job['id']}", cast_to=dict[str, Any]))
        return job["measured"] is not None

    wait_until(has_ended, 120, "the end of the job")
    assert job["status"] == "succeeded"
    assert job["estimate"]["total_steps"] == job["total_steps"] == 3
    assert job["estimate"]["total_tokens"] == job["trained_tokens"]
    again = client.post("/fine_tuning/estimate", cast_to=dict[str, Any], body=body)
    assert again["n_jobs_learned_from"] == 1
