"""The contract between the API and an inference server: one request in, a stream of events out.

On the wire an event is one JSON line (``application/x-ndjson``); its ``type`` says which.
"""

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from models.domain.base import Frozen, JsonObject, Text
from models.domain.rows import ChatMessage


class AdapterRef(Frozen):
    """An adapter whose name was resolved; the digest is its identity, the name is for messages."""

    name: str
    digest: str
    base_model: str
    base_fingerprint: str


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
    """How tokens are drawn; `temperature` 0 is greedy. `seed` makes the draw repeatable."""

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: Annotated[int, Field(ge=1, le=8)] = 1


class GenerateRequest(Frozen):
    """One conversation to continue, on the base (`adapter` None) or on one adapter."""

    request_id: str
    base_model: str
    adapter: AdapterRef | None
    messages: list[ChatMessage]
    tools: list[JsonObject] | None = None
    sampling: SamplingParams


FinishReason = Literal["stop", "length"]


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
    finish_reason: FinishReason | None = None


class Finished(Frozen):
    """The last event of a good stream."""

    type: Literal["finished"] = "finished"
    prompt_tokens: int
    completion_tokens: int


class Failed(Frozen):
    """The last event of a stream that broke; `error` is ``TuneryError.to_dict()``."""

    type: Literal["failed"] = "failed"
    error: JsonObject


GenerateEvent = Annotated[Started | Chunk | Finished | Failed, Field(discriminator="type")]
generate_event: TypeAdapter[GenerateEvent] = TypeAdapter(GenerateEvent)
