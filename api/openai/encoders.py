"""``/v1/embeddings``, and ``/v1/fill_mask`` and ``/v1/classify``: what encoders answer."""

import base64
import struct
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field, StrictInt

from api.deps import Caller, CallerDep, ServicesDep
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters, Text
from models.domain.encoding import EncodeAnswer, EncodeRequest, EncodeTask
from models.errors import InvalidRequestError
from models.registry import adapters, inference_servers
from models.registry.adapters import ResolvedModel

router = APIRouter(tags=["encoders"], route_class=StrictJsonRoute)

MAX_INPUTS = 2048
_Input = Annotated[Text, Field(min_length=1)]
_Inputs = Annotated[list[_Input], Field(min_length=1, max_length=MAX_INPUTS)]
_Ids = Annotated[
    list[Annotated[StrictInt, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, max_length=131_072)
]
_IdLists = Annotated[list[_Ids], Field(min_length=1, max_length=MAX_INPUTS)]


class EmbeddingsRequest(Parameters):
    """The body of ``POST /embeddings``."""

    model: Text
    input: _Input | _Inputs | _Ids | _IdLists
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: Text | None = None


class FillMaskRequest(Parameters):
    """The body of ``POST /fill_mask``; `input` has the model's mask token, e.g. ``[MASK]``."""

    model: Text
    input: _Input | _Inputs
    top_k: Annotated[StrictInt, Field(ge=1, le=100)] = 5


class ClassifyRequest(Parameters):
    """The body of ``POST /classify``; `input_pair` has a second text for each input."""

    model: Text
    input: _Input | _Inputs
    input_pair: _Input | _Inputs | None = None


@router.post("/embeddings")
async def create_embeddings(
    body: EmbeddingsRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Return a vector of length 1 for each input: the mean over its tokens, of an encoder."""
    given = body.input
    is_one = isinstance(given, str) or isinstance(given[0], int)
    answer = await _encode(
        services,
        caller,
        body.model,
        "embed",
        _Wanted(request.state.request_id, [given] if is_one else list(given)),
    )
    vectors = [result["embedding"] for result in answer.results]
    if body.dimensions is not None and body.dimensions != len(vectors[0]):
        raise InvalidRequestError(
            f"'dimensions' is {body.dimensions}; this model gives vectors of {len(vectors[0])}, "
            "and cutting them would change what they mean. Leave it out.",
            param="dimensions",
        )
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": _packed(vector) if body.encoding_format == "base64" else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    return {"object": "list", "model": body.model, "data": data, "usage": _usage(answer)}


@router.post("/fill_mask")
async def fill_mask(
    body: FillMaskRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Guess the words behind the masks of each input: the likeliest ones, with probabilities."""
    inputs = [body.input] if isinstance(body.input, str) else list(body.input)
    wanted = _Wanted(request.state.request_id, inputs, top_k=body.top_k)
    answer = await _encode(services, caller, body.model, "fill_mask", wanted)
    return _list("fill_mask", body.model, answer)


@router.post("/classify")
async def classify(
    body: ClassifyRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Say of which class each input is (or its words are), by a fine-tuned classifier."""
    inputs = [body.input] if isinstance(body.input, str) else list(body.input)
    pairs = [body.input_pair] if isinstance(body.input_pair, str) else body.input_pair
    wanted = _Wanted(request.state.request_id, inputs, pairs=pairs)
    answer = await _encode(services, caller, body.model, "classify", wanted)
    return _list("classification", body.model, answer)


class _Wanted:
    """What is asked, beside the model."""

    def __init__(
        self,
        request_id: str,
        inputs: list[Any],
        *,
        pairs: list[str] | None = None,
        top_k: int = 5,
    ) -> None:
        self.request_id = request_id
        self.inputs = inputs
        self.pairs = pairs
        self.top_k = top_k


async def _encode(
    services: Services, caller: Caller, name: str, task: EncodeTask, wanted: _Wanted
) -> EncodeAnswer:
    model, url = await run_in_threadpool(_resolve, services, caller, name)
    order = EncodeRequest(
        request_id=wanted.request_id,
        base_model=model.base_model,
        adapter=model.adapter,
        task=task,
        inputs=wanted.inputs,
        pairs=wanted.pairs,
        top_k=wanted.top_k,
    )
    return await services.inference.encode(url, order)


def _resolve(services: Services, caller: Caller, name: str) -> tuple[ResolvedModel, str]:
    with services.database.read() as session:
        model = adapters.resolve(session, caller.project_id, name)
        return model, inference_servers.for_base(session, model.base_model).url


def _packed(vector: list[float]) -> str:
    """Return little-endian float32 in base64, as the SDK asks by itself and unpacks."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(answer: EncodeAnswer) -> JsonObject:
    return {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}


def _list(kind: str, model: str, answer: EncodeAnswer) -> JsonObject:
    data = [
        {"object": kind, "index": index, **result} for index, result in enumerate(answer.results)
    ]
    return {
        "object": "list",
        "model": model,
        "data": data,
        "usage": _usage(answer),
        "system_fingerprint": answer.system_fingerprint,
    }
