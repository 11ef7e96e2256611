"""Each method of the unchanged `openai` SDK over a port: sync and async, on both databases."""

from typing import Any

import openai
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

from models.db import Database
from models.domain.generation import Chunk, TokenLogprob, ToolCallDelta
from models.registry import adapters, tenancy
from models.tables import Adapter
from tests.api.calls import ROW
from tests.api.fake_inference import FINISHED, HELLO, STARTED
from tests.contract import coverage
from tests.contract.conftest import Sdk

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def upload(sdk: Sdk, purpose: str = "fine-tune") -> Any:
    return sdk("files.create", file=("rows.jsonl", ROW), purpose=purpose)


@pytest.mark.filterwarnings("ignore:The `.content.*:DeprecationWarning")
def test_files(sdk: Sdk) -> None:
    file = sdk("files.create", file=("rows.jsonl", ROW), purpose="user_data")
    assert sdk("files.wait_for_processing", file.id, poll_interval=0.01).status == "processed"
    assert sdk("files.retrieve", file.id).filename == "rows.jsonl"
    assert sdk("files.content", file.id).content == ROW
    assert sdk("files.retrieve_content", file.id).encode() == ROW
    assert [each.id for each in sdk("files.list", purpose="user_data").data] == [file.id]
    assert sdk("files.delete", file.id).deleted
    assert sdk("files.list").data == []


def test_uploads(sdk: Sdk) -> None:
    about: dict[str, Any] = {
        "bytes": len(ROW),
        "filename": "rows.jsonl",
        "mime_type": "text/jsonl",
        "purpose": "user_data",
    }
    pending = sdk("uploads.create", **about)
    part = sdk("uploads.parts.create", pending.id, data=ROW)
    done = sdk("uploads.complete", pending.id, part_ids=[part.id])
    assert done.status == "completed"
    assert sdk("files.content", done.file.id).content == ROW
    assert sdk("uploads.cancel", sdk("uploads.create", **about).id).status == "cancelled"
    chunked = sdk("uploads.upload_file_chunked", file=ROW, part_size=50, **about)
    assert sdk("files.content", chunked.file.id).content == ROW


def test_jobs(sdk: Sdk) -> None:
    file = upload(sdk)
    job = sdk(
        "fine_tuning.jobs.create",
        model="base",
        training_file=file.id,
        suffix="mine",
        metadata={"team": "desk"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra_body={"peft": {"type": "lora", "r": 8}},
    )
    assert (job.status, job.model_extra["peft"]["r"]) == ("validating_files", 8)
    other = sdk("fine_tuning.jobs.create", model="base", training_file=file.id)
    assert sdk("fine_tuning.jobs.retrieve", job.id).hyperparameters.n_epochs == 2
    first = sdk("fine_tuning.jobs.list", limit=1)
    assert ([each.id for each in first.data], first.has_more) == ([other.id], True)
    second = sdk("fine_tuning.jobs.list", limit=1, after=other.id)
    assert ([each.id for each in second.data], second.has_more) == ([job.id], False)
    found = sdk("fine_tuning.jobs.list", metadata={"team": "desk"})
    assert [each.id for each in found.data] == [job.id]
    without = sdk("fine_tuning.jobs.list", extra_query={"metadata": "null"})
    assert [each.id for each in without.data] == [other.id]
    assert sdk("fine_tuning.jobs.pause", job.id).model_extra["pause_requested"]
    assert not sdk("fine_tuning.jobs.resume", job.id).model_extra["pause_requested"]
    assert sdk("fine_tuning.jobs.cancel", job.id).status == "cancelled"
    messages = [event.message for event in sdk("fine_tuning.jobs.list_events", job.id).data]
    assert messages[0] == "Fine-tuning job cancelled"
    assert messages[-1] == f"Created fine-tuning job: {job.id}"
    assert sdk("fine_tuning.jobs.checkpoints.list", job.id).data == []


def publish(sdk: Sdk, database: Database) -> str:
    """Add an adapter, as a worker does at the end of a job; return its name."""
    job = sdk("fine_tuning.jobs.create", model="base", training_file=upload(sdk).id)
    name = "ft:base:local:mine:abcdefgh"
    with database.write() as session:
        adapter = Adapter(
            name=name,
            project_id=tenancy.default_project(session).id,
            job_id=job.id,
            base_model="base",
            digest="d" * 64,
            bytes=7,
            manifest={"base_fingerprint": "f" * 64},
        )
        adapters.publish(session, adapter)
    return name


def test_models(sdk: Sdk, database: Database) -> None:
    name = publish(sdk, database)
    assert [model.id for model in sdk("models.list").data] == ["base", name]
    assert sdk("models.retrieve", name).model_extra["root"] == "base"
    assert sdk("models.delete", name).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        sdk("models.retrieve", name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_permissions(sdk: Sdk, database: Database) -> None:
    name = publish(sdk, database)
    with database.write() as session:
        projects = [tenancy.create_project(session, each).id for each in ("first", "second")]
    prefix = "fine_tuning.checkpoints.permissions"
    made = sdk("fine_tuning.checkpoints.permissions.create", name, project_ids=projects).data
    assert [each.project_id for each in made] == projects
    newest = sdk("fine_tuning.checkpoints.permissions.list", name, limit=1)
    assert ([each.id for each in newest.data], newest.has_more) == ([made[1].id], True)
    rest = sdk(f"{prefix}.list", name, after=newest.last_id, order="descending").data
    assert [each.id for each in rest] == [made[0].id]
    own = sdk("fine_tuning.checkpoints.permissions.retrieve", name, project_id=projects[0])
    assert [each.id for each in own.data] == [made[0].id]
    gone = sdk(
        "fine_tuning.checkpoints.permissions.delete",
        made[0].id,
        fine_tuned_model_checkpoint=name,
    )
    assert gone.deleted
    assert [each.id for each in sdk(f"{prefix}.list", name).data] == [made[1].id]


def test_chat(sdk: Sdk) -> None:
    for method in ("chat.completions.create", "chat.completions.parse"):
        answer = sdk(method, model="base", messages=MESSAGES)
        assert answer.choices[0].message.content == "Hello"
        assert answer.choices[0].finish_reason == "stop"


def test_chat_stream_helper(sdk: Sdk) -> None:
    answer = final(sdk, sdk("chat.completions.stream", model="base", messages=MESSAGES))
    assert answer.choices[0].message.content == "Hello"


def final(sdk: Sdk, entered: Any) -> Any:
    """The final completion that the SDK's helper puts together from a stream."""
    if isinstance(sdk.client, OpenAI):
        with entered as stream:
            return stream.get_final_completion()

    async def read() -> Any:
        async with entered as stream:
            return await stream.get_final_completion()

    return sdk.wait(read())


class Tide(BaseModel):
    """What a caller wants to know."""

    port: str


def test_chat_formats_and_tools(sdk: Sdk) -> None:
    def streamed(**fields: Any) -> Any:
        fields |= {"model": "base", "messages": MESSAGES}
        return final(sdk, sdk("chat.completions.stream", **fields))

    tide = '{"port": "Kiel"}'
    said = [STARTED, Chunk(text=tide[:9]), Chunk(text=tide[9:], finish_reason="stop"), FINISHED]
    sdk.fake.events = said
    parsed = sdk("chat.completions.parse", model="base", messages=MESSAGES, response_format=Tide)
    assert parsed.choices[0].message.parsed == Tide(port="Kiel")
    schema = sdk.fake.requests[-1].json_schema
    assert schema is not None
    assert schema["required"] == ["port"]
    assert streamed(response_format=Tide).choices[0].message.parsed == Tide(port="Kiel")

    tools = [pydantic_function_tool(Tide)]
    begun = ToolCallDelta(index=0, id="call_1", name="Tide", arguments=tide[:9])
    sdk.fake.events = [
        STARTED,
        Chunk(text="", tool_calls=(begun,)),
        Chunk(text="", tool_calls=(ToolCallDelta(index=0, arguments=tide[9:]),)),
        Chunk(text="", finish_reason="tool_calls"),
        FINISHED,
    ]
    answers = [
        sdk("chat.completions.parse", model="base", messages=MESSAGES, tools=tools),
        streamed(tools=tools),
    ]
    for answer in answers:
        [call] = answer.choices[0].message.tool_calls
        assert (call.id, call.function.name) == ("call_1", "Tide")
        assert call.function.parsed_arguments == Tide(port="Kiel")
        assert answer.choices[0].finish_reason == "tool_calls"

    scored = TokenLogprob(text="a", bytes=(97,), logprob=-0.5)
    sdk.fake.events = [STARTED, Chunk(text="a", logprobs=(scored,), finish_reason="stop"), FINISHED]
    answer = sdk("chat.completions.create", model="base", messages=MESSAGES, logprobs=True)
    assert answer.choices[0].logprobs.content[0].logprob == -0.5
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_completions(sdk: Sdk) -> None:
    answer = sdk("completions.create", model="base", prompt=["a", "b"], max_tokens=3)
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.usage.prompt_tokens == 14
    drawn = [
        Chunk(
            index=at,
            text=text,
            logprobs=(TokenLogprob(text="a", bytes=(97,), logprob=logprob),),
            finish_reason="stop",
        )
        for at, (text, logprob) in enumerate((("worse", -2.0), ("better", -0.5)))
    ]
    sdk.fake.events = [STARTED, *drawn, FINISHED]
    options: dict[str, Any] = {"echo": True, "logprobs": 1, "best_of": 2, "seed": 3, "stop": ["x"]}
    [best] = sdk("completions.create", model="base", prompt="a", **options).choices
    assert (best.text, best.logprobs.token_logprobs) == ("better", [-0.5])
    asked = sdk.fake.requests[-1]
    assert (asked.echo, asked.sampling.n, asked.sampling.stop) == (True, 2, ("x",))
    sdk.fake.events = list(HELLO)
    stream = sdk("completions.create", model="base", prompt="a", stream=True)
    if isinstance(sdk.client, OpenAI):
        pieces = [chunk.choices[0].text for chunk in stream]
    else:

        async def read() -> list[str]:
            return [chunk.choices[0].text async for chunk in stream]

        pieces = sdk.wait(read())
    assert "".join(pieces) == "Hello"


def test_embeddings(sdk: Sdk) -> None:
    """The SDK asks for base64 by itself and unpacks it."""
    answer = sdk("embeddings.create", model="base", input=["a", "b"])
    assert [each.index for each in answer.data] == [0, 1]
    assert answer.data[1].embedding == pytest.approx([0.6, 0.8])
    plain = sdk("embeddings.create", model="base", input="a", encoding_format="float")
    assert plain.data[0].embedding == [0.6, 0.8]
    assert plain.usage.total_tokens == 7


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_not_served(sdk: Sdk) -> None:
    """What is not there says so at once, in OpenAI's form."""
    for method, values in coverage.NOT_SERVED.items():
        with pytest.raises(openai.APIStatusError) as caught:
            sdk(method, **values)
        assert caught.value.status_code == coverage.NOT_SERVED_STATUS.get(method, 404), method
        assert caught.value.code in ("unknown_url", "method_not_allowed", "not_found"), method
