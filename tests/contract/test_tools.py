"""What public tools ask of OpenAI's fine-tuning works here: their calls, in their order.

Kiln's provider "OpenAI" and LlamaIndex's ``OpenAIFinetuneEngine`` as they are documented; only the
address of the service is another.
"""

import json
import time
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from models.db import Database
from models.domain.status import JobStatus
from models.registry import adapters, job_runs, jobs
from models.tables import Adapter, Job
from tests.contract.conftest import Sdk


def start(database: Database, job_id: str) -> None:
    """Take a job, as a worker does whose linter has seen the files."""
    with database.write() as session:
        jobs.move(session, job_id, JobStatus.QUEUED)
        taken = job_runs.claim(session, "worker", 600)
        assert taken is not None
        assert taken.id == job_id
        job_runs.fence(session, job_id, 1, estimated_finish=time.time() + 600)


def succeed(database: Database, job_id: str) -> str:
    """End a job as a worker does; return the model's name."""
    with database.write() as session:
        job = session.get_one(Job, job_id)
        name = adapters.new_name("base", "local", job.spec["suffix"])
        adapter = Adapter(
            name=name,
            project_id=job.project_id,
            job_id=job_id,
            base_model="base",
            digest="d" * 64,
            bytes=7,
            manifest={"base_fingerprint": "f" * 64},
        )
        adapters.publish(session, adapter)
        job_runs.succeed(session, job_id, 1, fine_tuned_model=name)
    return name


def kiln_status(sdk: Sdk, job_id: str) -> tuple[str, str]:
    """What Kiln shows of a job: its own word, and a sentence."""
    try:
        job = sdk("fine_tuning.jobs.retrieve", job_id)
    except openai.APIStatusError as error:
        return "unknown", "not found" if error.status_code == 404 else str(error)
    assert isinstance(job, FineTuningJob)
    if job.error and job.error.code:
        return "failed", f"{job.error.message} [Code: {job.error.code}]"
    if job.status in ("validating_files", "running", "queued"):
        left = "" if job.estimated_finish is None else int(job.estimated_finish - time.time())
        return "running", f"{job.status} {left}"
    words = {"failed": "failed", "cancelled": "failed", "succeeded": "completed"}
    return words.get(job.status, "unknown"), job.status


def kiln_rows(answers: list[dict[str, str]]) -> bytes:
    """Kiln's chat rows for answers with a JSON schema."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": "You name the port."},
                {"role": "user", "content": f"Question {number}"},
                {"role": "assistant", "content": json.dumps(answer)},
            ]
        }
        for number, answer in enumerate(answers)
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize("sdk", ["async"], indirect=True)
def test_kiln(sdk: Sdk, database: Database) -> None:
    def create(**parameters: Any) -> Any:
        files = [
            sdk("files.create", file=(f"{split}.jsonl", kiln_rows(rows)), purpose="fine-tune").id
            for split, rows in (("train", [{"port": "Kiel"}] * 3), ("val", [{"port": "Åbo"}]))
        ]
        numbers = ("n_epochs", "learning_rate_multiplier", "batch_size")
        return sdk(
            "fine_tuning.jobs.create",
            training_file=files[0],
            model="base",
            validation_file=files[1] if parameters else None,
            seed=parameters.get("seed"),
            hyperparameters={name: parameters[name] for name in numbers if name in parameters},
            suffix="kiln_ai.182736455463",
        )

    job = create(n_epochs=2, learning_rate_multiplier=0.5, batch_size=4, seed=9)
    assert (job.model, job.fine_tuned_model, job.seed) == ("base", None, 9)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert kiln_status(sdk, job.id) == ("running", "validating_files ")
    start(database, job.id)
    word, sentence = kiln_status(sdk, job.id)
    assert (word, sentence.split()[0]) == ("running", "running")
    assert 500 < int(sentence.split()[1]) <= 600
    name = succeed(database, job.id)
    assert kiln_status(sdk, job.id) == ("completed", "succeeded")
    assert sdk("fine_tuning.jobs.retrieve", job.id).fine_tuned_model == name
    assert ":kiln_ai.182736455463:" in name

    plain = create()
    assert plain.hyperparameters.n_epochs == "auto"
    start(database, plain.id)
    with database.write() as session:
        job_runs.fail(session, plain.id, 1, "invalid_file_format", "Line 3 is no JSON.")
    shown = ("failed", "Line 3 is no JSON. [Code: invalid_file_format]")
    assert kiln_status(sdk, plain.id) == shown
    assert kiln_status(sdk, "ftjob-gone") == ("unknown", "not found")

    schema = {"type": "object", "properties": {"port": {"type": "string"}}}
    answer = sdk(
        "chat.completions.create",
        model=name,
        messages=[
            {"role": "system", "content": "You name the port."},
            {"role": "user", "content": "Question 7"},
        ],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "task_response", "schema": schema, "strict": True},
        },
    )
    assert answer.choices[0].message.content == "Hello"
    asked = sdk.fake.requests[-1]
    assert asked.adapter is not None
    assert (asked.adapter.name, asked.json_schema) == (name, schema)


@pytest.mark.parametrize("sdk", ["sync"], indirect=True)
def test_llama_index(sdk: Sdk, database: Database) -> None:
    """It tries again while a job cannot be made yet, polls, and asks the result like any model."""
    rows = kiln_rows([{"port": "Kiel"}] * 3)
    file = sdk("files.create", file=("finetuning_events.jsonl", rows), purpose="fine-tune")
    job = sdk("fine_tuning.jobs.create", training_file=file.id, model="base")
    assert sdk("fine_tuning.jobs.retrieve", job.id).status == "validating_files"
    start(database, job.id)
    running = sdk("fine_tuning.jobs.retrieve", job.id)
    assert (running.status, running.fine_tuned_model, running.error) == ("running", None, None)
    name = succeed(database, job.id)
    ended = sdk("fine_tuning.jobs.retrieve", job.id)
    assert (ended.status, ended.fine_tuned_model) == ("succeeded", name)
    stream = sdk(
        "chat.completions.create",
        model=name,
        messages=[{"role": "user", "content": "Where?"}],
        temperature=0.1,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == "Hello"
