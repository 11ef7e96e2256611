"""Pure functions between OpenAI's wire format and Tunery's rows and domain types."""

import secrets
from typing import Any

from api.actions import Start
from api.openai.schemas import ChatRequest, JobCreate
from models.domain.base import JsonObject
from models.domain.generation import GenerateRequest, SamplingParams
from models.domain.training import Precision, TrainingSpec
from models.errors import InvalidRequestError
from models.registry.adapters import ResolvedModel
from worker.training import methods, objectives


def training_spec(body: JobCreate, start: Start) -> TrainingSpec:
    """Fill in the defaults of a job body; ``"auto"`` stays until the worker knows the data.

    A job that goes on from an adapter has the adapter's `peft` and, unless it names another, its
    precision.

    Raises:
        InvalidRequestError: `peft` or `objective` is unknown or malformed, or `peft` is not that of
            the adapter to go on from (param names the field).
    """
    given = {
        name: value
        for name in (
            "precision",
            "optimizer",
            "max_seq_length",
            "validation_split",
            "on_error",
            "on_overlong",
            "early_stopping",
            "checkpoint_steps",
            "priority",
            "num_devices",
        )
        if (value := getattr(body, name)) is not None
    }
    if start.spec is not None:
        given.setdefault("precision", start.spec.precision)
    peft = _peft(body.peft, start)
    if "nf4" not in methods.get_method(peft["type"]).precisions:
        given.setdefault("precision", Precision(type="bf16"))
    return TrainingSpec(
        model=start.base_model,
        init_adapter=start.adapter,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix or "",
        seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
        hyperparameters=body.resolved_hyperparameters,
        objective=_objective(body),
        peft=peft,
        **given,
    )


def _objective(body: JobCreate) -> JsonObject:
    given = dict(body.objective or {})
    if body.method is not None and body.method.type == "dpo":
        if given.get("type", "dpo") != "dpo":
            raise InvalidRequestError(
                f"'method' is dpo, but 'objective' is {given['type']!r}. Send only one of them.",
                param="objective.type",
            )
        given["type"] = "dpo"
        if body.method.beta is not None:
            given["beta"] = body.method.beta
    return objectives.parse_params(given).model_dump()


def _peft(given: JsonObject | None, start: Start) -> JsonObject:
    if start.spec is None:
        return methods.parse_params(given or {"type": "lora"}).model_dump()
    own = methods.parse_params(start.spec.peft).model_dump()  # with what is newer than the job
    wanted = methods.parse_params(own | (given or {})).model_dump()
    method = methods.get_method(own["type"])
    if not method.goes_on:
        raise InvalidRequestError(
            f"No job can go on from an adapter of {method.title}: what it was made from is not in "
            "its file. Start from the base model.",
            param="model",
            code="start_not_usable",
        )
    free = method.may_change
    for name, value in wanted.items():
        if name not in free and value != own.get(name):
            raise InvalidRequestError(
                f"peft.{name} is {value!r}; the adapter to go on from has {own.get(name)!r}, which "
                "cannot change. Leave 'peft' out, or start from the base model.",
                param=f"peft.{name}",
            )
    return wanted


def generate_request(body: ChatRequest, model: ResolvedModel, request_id: str) -> GenerateRequest:
    """Turn a chat body into the contract of inference servers.

    Raises:
        InvalidRequestError: the body asks for something that is not supported.
    """
    if (name := body.unsupported()) is not None:
        raise InvalidRequestError(
            f"'{name}' is not supported by this service yet. Leave it out.",
            param=name,
            code="unsupported_parameter",
        )
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    sampling: dict[str, Any] = {
        "max_tokens": body.max_completion_tokens or body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "n": body.n,
    }
    return GenerateRequest(
        request_id=request_id,
        base_model=model.base_model,
        adapter=model.adapter,
        messages=body.messages,
        sampling=SamplingParams(
            stop=stop, **{name: value for name, value in sampling.items() if value is not None}
        ),
    )
