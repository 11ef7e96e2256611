"""The contract between the API and an inference server of an encoder: one request, one answer."""

from typing import Annotated, Literal

from pydantic import Field

from models.domain.base import Frozen, JsonObject, Text
from models.domain.generation import AdapterRef

EncodeTask = Literal["fill_mask", "classify", "embed"]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=131_072)]


class EncodeRequest(Frozen):
    """Texts for an encoder, on the base (`adapter` None) or on one adapter.

    `pairs` has a second text for each; `top_k` is how many words are told for a mask.
    """

    request_id: str
    base_model: str
    adapter: AdapterRef | None
    task: EncodeTask
    inputs: Annotated[list[Text | TokenIds], Field(min_length=1, max_length=2048)]
    pairs: list[Text] | None = None
    top_k: Annotated[int, Field(ge=1, le=100)] = 5


class EncodeAnswer(Frozen):
    """One result for each input; what is in it depends on the task."""

    results: list[JsonObject]
    prompt_tokens: int
    system_fingerprint: str
