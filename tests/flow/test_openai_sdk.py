"""The sentence of the product as one test: the newest `openai` SDK, unchanged, over a port."""

import io
import json
import time
import zipfile
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob
from pydantic import BaseModel, Field

from tests.flow.conftest import HARBOUR_DESK, Up, first_rows, wait_until

BASE = "smollm2-135m-instruct"
QUESTION: Any = [
    {"role": "user", "content": "The gate will not open with my code. It cannot wait!"}
]


def ended(client: OpenAI, job: FineTuningJob) -> bool:
    return client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled")


@pytest.fixture(scope="module")
def tuned(up: Up, tmp_path_factory: pytest.TempPathFactory) -> FineTuningJob:
    """A finished job on 32 rows with a validation file."""
    client = up.client()
    folder = tmp_path_factory.mktemp("data")
    with first_rows(folder / "train.jsonl", 32).open("rb") as content:
        training = client.files.create(file=content, purpose="fine-tune")
    with first_rows(folder / "valid.jsonl", 4).open("rb") as content:
        validation = client.files.create(file=content, purpose="fine-tune")
    client.files.wait_for_processing(training.id, poll_interval=0.1)
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training.id,
        validation_file=validation.id,
        suffix="harbour",
        seed=7,
        metadata={"team": "desk"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}},
        },
        extra_body={
            "peft": {"type": "lora", "r": 8},
            "optimizer": {"learning_rate": 0.003},
            "checkpoint_steps": 4,
        },
    )
    assert job.status == "validating_files"
    wait_until(lambda: ended(client, job), 240, "the end of the job")
    return client.fine_tuning.jobs.retrieve(job.id)


def test_a_job_succeeds_with_resolved_numbers(up: Up, tuned: FineTuningJob) -> None:
    assert tuned.status == "succeeded", tuned.error
    assert tuned.fine_tuned_model is not None
    assert tuned.fine_tuned_model.startswith(f"ft:{BASE}:local:harbour:")
    assert tuned.hyperparameters.learning_rate_multiplier == 1.0
    assert tuned.trained_tokens
    assert tuned.trained_tokens > 0
    extra = tuned.model_extra or {}
    assert extra["precision"] == {"type": "nf4", "double_quant": True}
    assert extra["peft"]["r"] == 8
    assert (extra["step"], extra["total_steps"]) == (8, 8)
    found = up.client().fine_tuning.jobs.list(metadata={"team": "desk"})
    assert [job.id for job in found] == [tuned.id]
    assert list(up.client().fine_tuning.jobs.list(metadata={"team": "nobody"})) == []


def test_events_tell_the_story_in_openais_order(up: Up, tuned: FineTuningJob) -> None:
    events = list(up.client().fine_tuning.jobs.list_events(tuned.id, limit=5))[::-1]
    messages = [event.message for event in events if event.type == "message"]
    assert messages[0] == f"Created fine-tuning job: {tuned.id}"
    assert messages[1].startswith("Validating training file: file-")
    assert messages[2:4] == [
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    assert messages[-2:] == [
        f"New fine-tuned model created: {tuned.fine_tuned_model}",
        "The job has successfully completed",
    ]
    steps = [event.data for event in events if isinstance(event.data, dict)]
    data = [step for step in steps if "train_loss" in step]
    assert [step["step"] for step in data] == list(range(1, 9))
    assert data[-1]["train_loss"] < data[0]["train_loss"]
    losses = [step["full_valid_loss"] for step in steps if "full_valid_loss" in step]
    assert losses[-1] < 0.7 * losses[0]


def test_checkpoints_and_the_results_file_can_be_read(up: Up, tuned: FineTuningJob) -> None:
    client = up.client()
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(tuned.id, limit=1))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [8, 4]
    assert checkpoints[0].metrics.full_valid_loss is not None
    lines = client.files.content(tuned.result_files[0]).text.splitlines()
    assert lines[0].startswith("step,train_loss,train_accuracy,valid_loss,")
    assert len(lines) == 1 + 8


def test_the_new_model_answers_within_a_second_and_differs_from_the_base(
    up: Up, tuned: FineTuningJob
) -> None:
    client = up.client()
    answers = {}
    started = time.monotonic()
    for model in (tuned.fine_tuned_model, BASE):
        assert model is not None
        stream = client.chat.completions.create(
            model=model,
            messages=QUESTION,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        answers[model] = "".join(
            chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices
        )
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens > 0
        if model == tuned.fine_tuned_model:
            assert time.monotonic() - started < 30  # it is there at all; `bench` measures how fast
    assert answers[str(tuned.fine_tuned_model)].startswith("[TICKET] topic:")
    assert not answers[BASE].startswith("[TICKET]")


def test_a_checkpoint_can_be_called_by_its_name(up: Up, tuned: FineTuningJob) -> None:
    client = up.client()
    checkpoint = client.fine_tuning.jobs.checkpoints.list(tuned.id).data[0]
    answer = client.chat.completions.create(
        model=checkpoint.fine_tuned_model_checkpoint,
        messages=QUESTION,
        max_tokens=8,
        temperature=0,
    )
    assert (answer.choices[0].message.content or "").startswith("[TICKET] topic")


def test_an_adapter_leaves_as_a_zip_archive_and_comes_back(up: Up, tuned: FineTuningJob) -> None:
    assert tuned.fine_tuned_model is not None
    http = httpx.Client(
        base_url=f"{up.url}/v1", headers={"authorization": f"Bearer {up.key}"}, timeout=60
    )

    def bring(**changes: Any) -> httpx.Response:
        packed = io.BytesIO()
        config = json.loads(archive.read("adapter_config.json")) | changes
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as again:
            again.writestr("mine/adapter_config.json", json.dumps(config))
            again.writestr("mine/adapter_model.safetensors", weights)
        form = {"model": BASE, "suffix": "back"}
        return http.post("/adapters", files={"file": ("a.zip", packed.getvalue())}, data=form)

    with http:
        content = http.get(f"/adapters/{tuned.fine_tuned_model}/download").content
        archive = zipfile.ZipFile(io.BytesIO(content))
        weights = archive.read("adapter_model.safetensors")
        back = bring(base_model_name_or_path="elsewhere").json()
        assert back["id"].startswith(f"ft:{BASE}:local:back:")
        answers = [
            up.client().chat.completions.create(
                model=model, messages=QUESTION, temperature=0, max_tokens=12
            )
            for model in (tuned.fine_tuned_model, back["id"])
        ]
        texts = [answer.choices[0].message.content for answer in answers]
        assert texts[0] == texts[1]
        assert answers[0].system_fingerprint != answers[1].system_fingerprint
        for changes in ({"r": 4}, {"use_dora": True}, {"target_modules": ["q_proj"]}):
            refused = bring(**changes)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "file")
        assert http.delete(f"/models/{back['id']}").json()["deleted"]


def test_a_deleted_model_is_gone_and_never_answered_by_the_base(
    up: Up, tuned: FineTuningJob
) -> None:
    client = up.client()
    name = tuned.fine_tuned_model
    assert name is not None
    assert name in [model.id for model in client.models.list()]
    assert client.models.delete(name).deleted
    assert name not in [model.id for model in client.models.list()]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model=name, messages=QUESTION)
    assert caught.value.code == "model_not_found"


TIDES: Any = {
    "type": "function",
    "function": {
        "name": "get_tide",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "enum": ["north", "south"]}},
            "required": ["harbour"],
            "additionalProperties": False,
        },
    },
}


def test_a_base_whose_template_knows_no_tools_says_so(up: Up) -> None:
    """Calls are parsed back in ``tests/worker/inference``, by templates that know them."""
    with pytest.raises(openai.BadRequestError, match="does not support tools") as caught:
        up.client().chat.completions.create(model=BASE, messages=QUESTION, tools=[TIDES])
    assert caught.value.param == "tools"


class Berth(BaseModel):
    """What the model has to fill in."""

    number: Annotated[int, Field(ge=1, le=9)]
    side: Literal["port", "starboard"]


def test_an_answer_is_parsed_into_the_class_that_was_asked_for(up: Up) -> None:
    [choice] = (
        up.client()
        .chat.completions.parse(
            model=BASE,
            messages=[{"role": "user", "content": "Which berth is free?"}],
            response_format=Berth,
            temperature=0,
            max_tokens=48,
        )
        .choices
    )
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Berth)


def test_every_faulty_line_is_named_before_a_job_runs(up: Up) -> None:
    client = up.client()
    rows = HARBOUR_DESK.read_bytes().splitlines()[:6]
    rows[1] = b"{"
    rows[3] = b'{"messages": [{"role": "user", "content": "a"}]}'
    rows[5] = rows[5].replace(b'"assistant"', b'"asistant"')
    file = client.files.create(file=("three.jsonl", b"\n".join(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    wait_until(lambda: ended(client, job), 30, "the end of the job")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed"
    assert (job.model_extra or {})["attempt"] == 0  # no trainer was ever started for it
    assert job.error is not None
    for line in (2, 4, 6):
        assert f"Line {line}" in job.error.message
    report = client.get(f"/files/{file.id}/report", cast_to=str)
    assert [json.loads(line)["line"] for line in report.splitlines()] == [2, 4, 6]
    cleaned = client.get(f"/files/{file.id}/cleaned", cast_to=str)
    assert cleaned.encode().splitlines() == rows[::2]


def test_a_data_set_is_shown_as_the_base_will_see_it(up: Up, tuned: FineTuningJob) -> None:
    query = f"?model={BASE}&rows=2&max_length=40"
    path = f"/files/{tuned.training_file}/preview{query}"
    shown: Any = up.client().get(path, cast_to=dict[str, object])
    assert [row["line"] for row in shown["rows"]] == [1, 2]
    further: Any = up.client().get(f"{path}&offset=3", cast_to=dict[str, object])
    assert [row["line"] for row in further["rows"]] == [4, 5]
    first = shown["rows"][0]
    assert first["truncated"]
    assert len(first["input_ids"]) == 40
    whole: Any = up.client().get(path.replace("=40", "=400"), cast_to=dict[str, object])
    trained = [span["text"] for span in whole["rows"][0]["spans"] if span["trained"]]
    assert [text[:15] for text in trained] == ["[TICKET] topic:"]
    assert trained[0].endswith("<|im_end|>")
    assert whole["statistics"]["n_rows"] == 32
    assert whole["statistics"]["n_trained"] > 32


def test_the_tokens_of_a_job_are_reused_by_the_next(up: Up, tuned: FineTuningJob) -> None:
    objects = up.home.path / "objects" / "tokens"
    before = sorted(objects.iterdir())
    assert len(before) >= 2  # training and validation
    client = up.client()
    again = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=tuned.training_file,
        validation_file=tuned.validation_file,
        hyperparameters={"n_epochs": 1, "batch_size": 32},
    )
    wait_until(lambda: ended(client, again), 240, "the end of the job")
    assert client.fine_tuning.jobs.retrieve(again.id).status == "succeeded"
    assert sorted(objects.iterdir()) == before


def test_a_malformed_line_fails_the_job_with_its_number(up: Up) -> None:
    client = up.client()
    good = (
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    file = client.files.create(file=("bad.jsonl", good + b"{not json}\n"), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    wait_until(lambda: ended(client, job), 30, "the end of the job")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "invalid_file_format"
    assert job.error.param == "training_file"
    assert "Line 2" in job.error.message
