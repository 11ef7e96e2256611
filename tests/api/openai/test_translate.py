"""Between OpenAI's bodies and our types."""

from typing import Any

import pytest

from api import bodies
from api.actions import Start
from api.openai import translate
from api.openai.schemas import ChatRequest, CompletionRequest, JobCreate
from models.domain.generation import AdapterRef, GenerateRequest, ToolName
from models.errors import InvalidRequestError
from models.registry.adapters import ResolvedModel
from models.registry.page import Page
from models.tables import File, Job

JOB: dict[str, Any] = {"model": "base", "training_file": "file-1"}
CHAT: dict[str, Any] = {"model": "mine", "messages": [{"role": "user", "content": "Hi"}]}
ADAPTER = AdapterRef(name="mine", digest="d" * 64, base_model="base", base_fingerprint="f" * 64)
START = Start("base")
MINE = ResolvedModel("mine", "base", ADAPTER, 1.9, "ftjob-1")


def files(*ids: str) -> list[File]:
    return [
        File(id=id_, created_at=1.9, bytes=1, filename="a", purpose="batch", status="processed")
        for id_ in ids
    ]


def test_a_list_names_its_ends() -> None:
    body = bodies.list_body(Page(files("a", "b", "c"), True), bodies.file_body)
    assert (body["first_id"], body["last_id"], body["has_more"]) == ("a", "c", True)
    assert [item["created_at"] for item in body["data"]] == [1, 1, 1]


def test_a_plain_job_trains_qlora() -> None:
    spec = translate.training_spec(JobCreate(**JOB), START)
    assert (spec.precision.type, spec.peft["type"], spec.objective["type"]) == (
        *("nf4", "lora", "sft"),
    )
    assert spec.hyperparameters.n_epochs == "auto"
    assert not spec.is_resolved


def test_a_seed_is_drawn_and_kept_when_none_is_given() -> None:
    seeds = {translate.training_spec(JobCreate(**JOB), START).seed for _ in range(5)}
    assert len(seeds) > 1
    assert translate.training_spec(JobCreate(**JOB, seed=0), START).seed == 0


def test_our_fields_reach_the_spec() -> None:
    given = {"max_seq_length": 64, "on_error": "skip", "priority": 0, "checkpoint_steps": 7}
    spec = translate.training_spec(JobCreate(**JOB, **given), START)
    assert given.items() <= spec.model_dump().items()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"peft": {"type": "nothing"}}, "peft.type"),
        ({"peft": {"type": "lora", "rr": 1}}, "peft.rr"),
        ({"objective": {"type": "nothing"}}, "objective.type"),
    ],
)
def test_a_bad_part_names_its_path(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as raised:
        translate.training_spec(JobCreate(**JOB, **fields), START)
    assert raised.value.param == param


def test_a_failed_job_shows_its_error_and_no_estimate() -> None:
    spec = translate.training_spec(JobCreate(**JOB, seed=1), START)
    job = Job(
        id="ftjob-1",
        created_at=1.0,
        status="failed",
        spec=spec.model_dump(mode="json"),
        training_file="file-1",
        estimated_finish=9.0,
        error_code="bad",
        error_message="It failed.",
        error_param="training_file",
    )
    body = bodies.job_body(job, "org")
    assert body["error"] == {"code": "bad", "message": "It failed.", "param": "training_file"}
    assert (body["estimated_finish"], body["organization_id"]) == (None, "org")
    assert body["method"]["supervised"]["hyperparameters"] == body["hyperparameters"]


def test_a_chat_body_becomes_a_request_for_the_resolved_adapter() -> None:
    body = ChatRequest.model_validate(
        CHAT | {"max_tokens": 3, "max_completion_tokens": 4, "temperature": 0, "stop": ["a", "b"]}
    )
    request = translate.generate_request(body, MINE, "req_1")
    assert (request.base_model, request.adapter, request.request_id) == ("base", ADAPTER, "req_1")
    assert request.sampling.max_tokens == 4
    assert request.sampling.temperature == 0
    assert request.sampling.stop == ("a", "b")


def test_a_chat_body_without_numbers_gets_openais_defaults() -> None:
    sampling = translate.generate_request(ChatRequest(**CHAT), MINE, "req_1").sampling
    assert (sampling.temperature, sampling.top_p, sampling.n, sampling.stop) == (1, 1, 1, ())
    assert (sampling.max_tokens, sampling.seed) == (None, None)


def test_an_unsupported_field_is_named() -> None:
    body = ChatRequest.model_validate(CHAT | {"functions": [{"name": "f"}]})
    with pytest.raises(InvalidRequestError, match="'functions' is not supported") as raised:
        translate.generate_request(body, MINE, "req_1")
    assert (raised.value.param, raised.value.code) == ("functions", "unsupported_parameter")


def generate(**fields: Any) -> GenerateRequest:
    return translate.generate_request(ChatRequest.model_validate(CHAT | fields), MINE, "req_1")


def test_how_tokens_are_drawn_arrives_as_it_was_sent() -> None:
    same = {
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "ignore_eos": True,
    }
    sampling = generate(**same, logit_bias={"7": -100}, logprobs=True, top_logprobs=4).sampling
    assert same.items() <= sampling.model_dump().items()
    assert (sampling.logit_bias, sampling.logprobs) == ({7: -100}, 4)
    assert generate(logprobs=True).sampling.logprobs == 0
    assert generate(logprobs=False).sampling.logprobs is None
    assert generate(top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize(
    ("value", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
            {"type": "array"},
        ),
        ({"type": "json_schema", "json_schema": {"name": "a", "strict": True}}, {}),
    ],
)
def test_a_response_format_becomes_a_schema(value: object, schema: object) -> None:
    assert generate(response_format=value).json_schema == schema


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "x-own": 1}}


def test_tools_arrive_as_they_were_sent_unless_none_may_be_called() -> None:
    request = generate(tools=[TOOL])
    assert (request.tools, request.tool_choice, request.parallel_tool_calls) == (
        [TOOL],
        "auto",
        True,
    )
    assert generate(tools=[TOOL], tool_choice="none").tools is None
    assert generate(tools=[TOOL], tool_choice="required").tool_choice == "required"
    named = generate(tools=[TOOL], tool_choice=TOOL | {"function": {"name": "f"}})
    assert named.tool_choice == ToolName(name="f")
    assert not generate(tools=[TOOL], parallel_tool_calls=False).parallel_tool_calls


def complete(**fields: Any) -> list[GenerateRequest]:
    body = CompletionRequest.model_validate({"model": "mine", "prompt": "a", **fields})
    return translate.completion_requests(body, MINE, "req_1")


def test_each_prompt_of_a_completion_is_a_request() -> None:
    assert [each.prompt for each in complete(prompt=["a", "b"])] == ["a", "b"]
    assert [each.prompt for each in complete(prompt=[[1], [2, 3]])] == [[1], [2, 3]]
    [tokens] = complete(prompt=[1, 2], echo=True)
    assert (tokens.prompt, tokens.echo, tokens.messages) == ([1, 2], True, None)


def test_a_completion_has_openais_defaults_and_best_of_needs_log_probabilities() -> None:
    [plain] = complete()
    assert (plain.sampling.max_tokens, plain.sampling.n, plain.sampling.logprobs) == (16, 1, None)
    [ranked] = complete(n=2, best_of=5, max_tokens=0)
    assert (ranked.sampling.max_tokens, ranked.sampling.n) == (0, 5)
    assert ranked.sampling.logprobs == 0
    assert complete(n=2, best_of=2)[0].sampling.logprobs is None


def test_a_resolved_model_says_what_it_stands_on() -> None:
    body = bodies.resolved_body(MINE, "proj_1")
    assert (body["id"], body["root"], body["parent"]) == ("mine", "base", "base")
    assert (body["owned_by"], body["digest"], body["created"]) == ("proj_1", "d" * 64, 1)
    base = bodies.resolved_body(ResolvedModel("base", "base", None, 1.0), "proj_1")
    assert (base["owned_by"], base["parent"], base["digest"]) == ("tunery", None, None)


def test_openais_dpo_is_our_objective() -> None:
    numbers = {"beta": 0.3, "n_epochs": 2}
    method = {"type": "dpo", "dpo": {"hyperparameters": numbers}}
    spec = translate.training_spec(JobCreate(**JOB, method=method), START)
    assert spec.objective == {"type": "dpo", "beta": 0.3, "label_smoothing": 0.0}
    assert spec.hyperparameters.n_epochs == 2
    plain = translate.training_spec(JobCreate(**JOB, method={"type": "dpo"}), START)
    assert plain.objective["beta"] == 0.1


def test_two_objectives_in_one_job_are_refused() -> None:
    body = JobCreate(**JOB, method={"type": "dpo"}, objective={"type": "sft"})
    with pytest.raises(InvalidRequestError, match="method' is dpo") as caught:
        translate.training_spec(body, START)
    assert caught.value.param == "objective.type"
