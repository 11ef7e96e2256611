"""``/v1/fine_tuning/jobs/{id}/samples``: what base and tuned model answer, side by side."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field, StrictInt, ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.access import INFERENCE
from api.deps import Caller, CallerDep, ServicesDep, require_tokens
from api.openai.schemas import Message
from api.openai.serving import CLIENT_CLOSED_REQUEST, unless_disconnected
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters, Text
from models.domain.generation import Chunk, GenerateEvent, GenerateRequest, SamplingParams
from models.domain.rows import ChatMessage, ChatRow
from models.errors import InvalidRequestError, NotFoundError
from models.registry import adapters, checkpoints, files, inference_servers, jobs
from models.registry.adapters import ResolvedModel
from models.registry.page import Cursor
from models.registry.usage import User
from models.storage import ObjectNotFoundError
from models.tables import File, Job

MAX_SAMPLES = 8
FIRST_BYTES = 256 * 1024

router = APIRouter(prefix="/fine_tuning/jobs", tags=["fine-tuning"], route_class=StrictJsonRoute)


class SampleRequest(Parameters):
    """What is asked: the first rows of the job's held-out data, or `prompts` of one's own.

    `model` is a checkpoint of the job; without it the job's result, else its newest checkpoint.
    """

    limit: Annotated[StrictInt, Field(ge=1, le=MAX_SAMPLES)] = 3
    max_tokens: Annotated[StrictInt, Field(ge=1, le=1024)] = 80
    model: Text | None = None
    prompts: (
        Annotated[
            list[Annotated[list[Message], Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_SAMPLES),
        ]
        | None
    ) = None


@dataclass(frozen=True, slots=True)
class _Question:
    """What the models are asked, and what the data say."""

    messages: list[ChatMessage]
    wanted: str | None = None


@dataclass(frozen=True, slots=True)
class _Asked:
    """Two models of one inference server, and what they are asked."""

    base: ResolvedModel
    tuned: ResolvedModel
    url: str
    questions: list[_Question]
    max_tokens: int

    def requests(self, question: _Question, request_id: str) -> list[GenerateRequest]:
        """Return the same request for the base and for the tuned model."""
        return [
            GenerateRequest(
                request_id=f"{request_id}-{number}",
                base_model=self.base.base_model,
                adapter=model.adapter,
                messages=question.messages,
                sampling=SamplingParams(max_tokens=self.max_tokens, temperature=0.0),
            )
            for number, model in enumerate((self.base, self.tuned))
        ]


@router.post("/{job_id}/samples", dependencies=[Depends(INFERENCE), Depends(require_tokens)])
async def sample_job(
    job_id: str, body: SampleRequest, request: Request, services: ServicesDep, caller: CallerDep
) -> Response:
    """Ask the base model and the tuned one the same questions, without chance (temperature 0).

    The questions are the beginnings of the first conversations of the job's validation file, or of
    its training file where it has none; ``wanted`` is how they end there. The key needs the scopes
    ``read`` and ``infer``.
    """
    asked = await run_in_threadpool(_prepare, services, caller, job_id, body)
    data: list[JsonObject] = []

    async def ask() -> None:
        for at, question in enumerate(asked.questions):
            # Both at once: on one base they share a batch.
            answers = [
                _answer(
                    services.inference.generate(asked.url, generate),
                    services,
                    caller.using(generate.adapter.name if generate.adapter else asked.base.name),
                )
                for generate in asked.requests(question, f"{request.state.request_id}-{at}")
            ]
            data.append(_sample(question, await asyncio.gather(*answers)))

    if not await unless_disconnected(request, ask()):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return JSONResponse({"object": "list", "data": data, "has_more": False})


def _sample(question: _Question, answers: Sequence[JsonObject]) -> JsonObject:
    return {
        "object": "fine_tuning.job.sample",
        "messages": [each.model_dump(exclude_none=True) for each in question.messages],
        "wanted": question.wanted,
        "answers": list(answers),
    }


def _prepare(services: Services, caller: Caller, job_id: str, body: SampleRequest) -> _Asked:
    with services.database.read() as session:
        job = jobs.get(session, caller.project_id, job_id)
        tuned = adapters.resolve(session, caller.project_id, _tuned(session, job, body.model))
        base = adapters.resolve(session, caller.project_id, job.base_model)
        url = inference_servers.for_base(session, job.base_model).url
        file_id = files.with_rows(
            session, caller.project_id, job.validation_file, job.training_file
        )
        file = None if file_id is None else session.get(File, file_id)
    if body.prompts is not None:
        questions = [_Question(messages) for messages in body.prompts]
    else:
        questions = _from_file(services, file, body.limit)
    return _Asked(base, tuned, url, questions, body.max_tokens)


def _tuned(session: Session, job: Job, wanted: str | None) -> str:
    """Return the name of a model that the job made.

    Raises:
        InvalidRequestError: it made none yet, or not the one that is wanted.
    """
    saved = checkpoints.list_page(session, job.id, Cursor(limit=100)).rows
    names = [name for name in (job.fine_tuned_model, *(each.name for each in saved)) if name]
    if not names:
        raise InvalidRequestError(
            f"Job {job.id} has no checkpoint yet, so there is nothing to ask.",
            param="fine_tuning_job_id",
            code="no_checkpoint",
        )
    if wanted is not None and wanted not in names:
        raise InvalidRequestError(
            f"{wanted!r} is no checkpoint of job {job.id}.", param="model", code="model_not_found"
        )
    return wanted or names[0]


def _from_file(services: Services, file: File | None, limit: int) -> list[_Question]:
    found: list[_Question] = []
    if file is not None:
        try:
            chunks = services.store.stream(file.cleaned_key or file.object_key)
        except ObjectNotFoundError:
            raise NotFoundError(
                f"The content of file {file.id!r} is gone from the object store. Send 'prompts'.",
                param="prompts",
                code="file_not_found",
            ) from None
        found = list(_questions(_first_lines(chunks), limit))
    if not found:
        raise InvalidRequestError(
            "The job's data have no conversations to begin from. Send 'prompts'.",
            param="prompts",
            code="missing_required_parameter",
        )
    return found


def _first_lines(chunks: Iterable[bytes]) -> list[bytes]:
    """Return the whole lines among the first `FIRST_BYTES` of a file."""
    data, is_whole = b"", True
    for chunk in chunks:
        data += chunk
        if len(data) > FIRST_BYTES:
            is_whole = False
            break
    lines = data.split(b"\n")
    return lines if is_whole else lines[:-1]


def _questions(lines: list[bytes], limit: int) -> Iterator[_Question]:
    """Yield the first conversations up to their last answer; other rows are passed over."""
    n_found = 0
    for line in lines:
        if n_found == limit:
            return
        try:
            row = ChatRow.model_validate_json(line)
        except ValidationError:
            continue  # another shape of row: nothing to ask
        last = max(
            (at for at, each in enumerate(row.messages) if each.role == "assistant"), default=0
        )
        if last > 0:
            n_found += 1
            yield _Question(row.messages[:last], row.messages[last].text)


async def _answer(
    events: AsyncGenerator[GenerateEvent, None], services: Services, user: User
) -> JsonObject:
    """Return an answer's text and end; its tokens are counted for the user."""
    text, reason = "", None
    async for event in services.meter.watch(user, events):
        if isinstance(event, Chunk):
            text += event.text
            reason = event.finish_reason or reason
    return {"model": user.model, "text": text, "finish_reason": reason}
