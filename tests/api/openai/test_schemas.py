"""The bodies of requests: what is taken, what is refused, and which hyperparameters win."""

from typing import Any

import pytest
from pydantic import ValidationError

from api.openai.schemas import MAX_PROMPTS, ChatRequest, CompletionRequest, JobCreate
from models.domain.training import Hyperparameters

JOB: dict[str, Any] = {"model": "base", "training_file": "file-1"}
CHAT: dict[str, Any] = {"model": "base", "messages": [{"role": "user", "content": "Hi"}]}


def supervised(**numbers: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": numbers}}


def test_a_plain_job_leaves_all_three_numbers_to_the_service() -> None:
    assert JobCreate(**JOB).resolved_hyperparameters == Hyperparameters()


def test_both_places_of_hyperparameters_are_read() -> None:
    wanted = Hyperparameters(n_epochs=2)
    old = JobCreate(**JOB, hyperparameters=wanted)
    new = JobCreate(**JOB, method=supervised(n_epochs=2))
    both = JobCreate(**JOB, hyperparameters=wanted, method=supervised(n_epochs=2))
    assert [body.resolved_hyperparameters for body in (old, new, both)] == [wanted] * 3


def test_two_sets_of_hyperparameters_that_differ_are_refused() -> None:
    with pytest.raises(ValidationError, match="differ"):
        JobCreate(**JOB, hyperparameters={"n_epochs": 3}, method=supervised(n_epochs=2))


def test_a_validation_file_and_a_split_exclude_each_other() -> None:
    assert JobCreate(**JOB, validation_split=0.1).validation_split == 0.1
    assert JobCreate(**JOB, validation_file="file-2", validation_split=0.0)
    with pytest.raises(ValidationError, match="exclude each other"):
        JobCreate(**JOB, validation_file="file-2", validation_split=0.1)
    with pytest.raises(ValidationError, match=r"0\.5"):
        JobCreate(**JOB, validation_split=0.6)


@pytest.mark.parametrize(
    "numbers",
    [{"n_epochs": 0}, {"n_epochs": "2"}, {"batch_size": 257}, {"learning_rate_multiplier": 0}],
)
def test_hyperparameters_out_of_range_are_refused(numbers: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobCreate(**JOB, method=supervised(**numbers))


def test_an_empty_suffix_is_none_and_the_longest_is_64() -> None:
    assert JobCreate(**JOB, suffix="").suffix is None
    assert JobCreate(**JOB, suffix="x" * 64).suffix == "x" * 64


def test_metadata_at_its_limits_is_taken() -> None:
    pairs = {f"{i:02d}" + "k" * 62: "v" * 512 for i in range(16)}
    assert JobCreate(**JOB, metadata=pairs).metadata == pairs


def test_an_earlier_answer_loses_what_no_model_reads() -> None:
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [],
    }
    body = ChatRequest.model_validate(CHAT | {"messages": [turn]})
    assert body.messages[0].model_dump(exclude_none=True) == {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1_000_000),
        ("seed", 2**70),
        ("temperature", 2.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_completion_tokens", "5"),
        ("stop", ""),
        ("stop", ["a"] * 5),
        ("messages", []),
        ("messages", "Hi"),
        ("stream", "yes"),
        ("no_such_field", None),
        ("frequency_penalty", 2.1),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"5": 101}),
        ("top_logprobs", 21),
        ("top_logprobs", 2),  # without logprobs
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "json_object", "json_schema": {"name": "a"}}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "a b"}}),
        ("tools", [{"type": "custom", "custom": {"name": "f"}}]),
        ("tools", [{"type": "function", "function": {"name": "f g"}}]),
        ("tool_choice", "required"),  # without tools
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("parallel_tool_calls", 1),
    ],
)
def test_a_bad_chat_field_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate(CHAT | {name: value})


@pytest.mark.parametrize(
    ("name", "harmless", "harmful"),
    [
        ("functions", [], [{"name": "f"}]),
        ("function_call", "none", {"name": "f"}),
        ("modalities", ["text"], ["text", "audio"]),
        ("audio", None, {"voice": "x"}),
    ],
)
def test_a_field_is_unsupported_only_where_it_changes_the_answer(
    name: str, harmless: object, harmful: object
) -> None:
    for value in (None, harmless):
        assert ChatRequest.model_validate(CHAT | {name: value}).unsupported() is None
    assert ChatRequest.model_validate(CHAT | {name: harmful}).unsupported() == name


@pytest.mark.parametrize(
    "method",
    [
        {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}},
        {"type": "dpo", "dpo": {"hyperparameters": {"beta": 2.5}}},
        {"type": "dpo", "supervised": {}},
        {"type": "supervised", "dpo": {"hyperparameters": {"beta": 0.1}}},
        {"type": "supervised", "supervised": {"hyperparameters": {"beta": 0.1}}},
    ],
)
def test_what_is_not_of_the_chosen_method_is_refused(method: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        JobCreate(**JOB, method=method)


@pytest.mark.parametrize(
    "prompt", ["", "Once", ["Once", "Twice"], [1, 2], [[1, 2], [3]], ["a"] * MAX_PROMPTS]
)
def test_a_prompt_is_text_or_tokens_one_or_several(prompt: object) -> None:
    body = CompletionRequest.model_validate({"model": "base", "prompt": prompt})
    assert body.prompt == prompt


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt", None),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [True]),
        ("prompt", ["a"] * (MAX_PROMPTS + 1)),
        ("suffix", "end"),
        ("best_of", 0),
        ("best_of", 21),
        ("logprobs", 6),
        ("logprobs", True),
        ("max_tokens", -1),
        ("echo", 1),
        ("messages", []),
    ],
)
def test_a_bad_completion_field_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate({"model": "base", "prompt": "a", name: value})


def test_best_of_has_to_be_at_least_n_and_is_not_streamed() -> None:
    body: dict[str, Any] = {"model": "base", "prompt": "a"}
    assert CompletionRequest(**body, n=2, best_of=3)
    assert CompletionRequest(**body, n=2, best_of=2, stream=True)
    with pytest.raises(ValidationError, match="at least 'n'"):
        CompletionRequest(**body, n=2, best_of=1)
    with pytest.raises(ValidationError, match="streamed"):
        CompletionRequest(**body, n=2, best_of=3, stream=True)
