"""The contract between the API and an inference server: one request in, a stream of events out.

On the wire an event is one JSON line (``application/x-ndjson``); its ``type`` says which.
"""

from operator import not_
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator

from models.domain.base import Frozen, JsonObject, Text
from models.domain.rows import ChatMessage

MAX_CHOICES = 64
"""Choices of one request: more than an engine has room for could never begin."""


class AdapterRef(Frozen):
    """An adapter whose name was resolved; the digest is its identity, the name is for messages.

    `merged` says that its owner wants it answered by a merged copy of the base. It is written only
    where it is true: specifications of jobs hold references too, and their digests must not change.
    """

    name: str
    digest: str
    base_model: str
    base_fingerprint: str
    merged: Annotated[bool, Field(exclude_if=not_)] = False


class PreviewRequest(Frozen):
    """Rows of a data set to be shown as a base model sees them.

    `rows_key` is where the lint has put the usable rows; `n_rows` are shown from row `offset` on
    (counted from 0), the tokens of the first `n_counted` are counted, as if `max_length` were the
    job's limit.
    """

    rows_key: Text
    n_rows: Annotated[int, Field(ge=0, le=100)] = 5
    offset: Annotated[int, Field(ge=0)] = 0
    n_counted: Annotated[int, Field(ge=0, le=10_000)] = 1000
    max_length: Annotated[int, Field(ge=1)] = 2048


class SamplingParams(Frozen):
    """How tokens are drawn; `temperature` 0 is greedy. `seed` makes the draw repeatable.

    `logprobs` reports each token's log-probability and those of as many likeliest ones.
    """

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1


class ToolName(Frozen):
    """The one tool that has to be called."""

    name: Text


class GenerateRequest(Frozen):
    """One conversation or one text to continue, on the base (`adapter` None) or on one adapter.

    A `prompt` of integers is token ids. `json_schema` is what the text has to fulfil; with tools
    that need not be called, either it or the calls. `echo` puts the prompt before the text.
    """

    request_id: str
    base_model: str
    adapter: AdapterRef | None
    messages: list[ChatMessage] | None = None
    prompt: Text | list[int] | None = None
    echo: bool = False
    tools: list[JsonObject] | None = None
    tool_choice: Literal["auto", "required"] | ToolName = "auto"
    parallel_tool_calls: bool = True
    json_schema: JsonObject | None = None
    sampling: SamplingParams

    @model_validator(mode="after")
    def _one_input(self) -> "GenerateRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("either 'messages' or 'prompt' is needed, and not both")
        return self


FinishReason = Literal["stop", "length", "tool_calls"]


class TopLogprob(Frozen):
    """A token that could have been drawn, and its log-probability by the model.

    `text` is the token's bytes as UTF-8, with U+FFFD for those that are no whole character.
    """

    text: str
    bytes: tuple[int, ...]
    logprob: float


class TokenLogprob(Frozen):
    """A token of the text; `logprob` is None for a text's very first token, which nothing precedes.

    `offset` is where the token begins in the text, in characters.
    """

    text: str
    bytes: tuple[int, ...]
    logprob: float | None
    offset: int = 0
    top: tuple[TopLogprob, ...] = ()


class ToolCallDelta(Frozen):
    """A part of tool call `index`: the first part has `id` and `name`, each adds arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class Started(Frozen):
    """The first event: the request is admitted, its adapter is resident."""

    type: Literal["started"] = "started"
    prompt_tokens: int
    system_fingerprint: str


class Chunk(Frozen):
    """Text of choice `index`, maybe empty; its last chunk has a `finish_reason`."""

    type: Literal["chunk"] = "chunk"
    index: int = 0
    text: Text
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None


class Finished(Frozen):
    """The last event of a good stream; `cached_tokens` of the prompt's were not computed anew."""

    type: Literal["finished"] = "finished"
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Failed(Frozen):
    """The last event of a stream that broke; `error` is ``TuneryError.to_dict()``."""

    type: Literal["failed"] = "failed"
    error: JsonObject


GenerateEvent = Annotated[Started | Chunk | Finished | Failed, Field(discriminator="type")]
generate_event: TypeAdapter[GenerateEvent] = TypeAdapter(GenerateEvent)
