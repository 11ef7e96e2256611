"""``/v1/batches``: files of requests that run in the background."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from api import bodies
from api.deps import After, CallerDep, ReadSession, ServicesDep, WriteSession
from api.openai.schemas import Metadata
from api.strict_json import StrictJsonRoute
from models.db import after_commit
from models.domain.base import JsonObject, Parameters, Text
from models.errors import InvalidRequestError
from models.registry import batches, files
from models.registry.page import Cursor
from models.tables import Batch

router = APIRouter(prefix="/batches", tags=["batches"], route_class=StrictJsonRoute)

_TIMES = (
    "expires_at",
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)


class BatchCreate(Parameters):
    """The body of ``POST /batches``."""

    input_file_id: Text
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: JsonObject | None = None


def _batch_body(batch: Batch) -> JsonObject:
    times = {name: getattr(batch, name) for name in _TIMES}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model,
        "errors": batch.errors and {"object": "list", **batch.errors},
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created_at),
        **{name: None if time is None else int(time) for name, time in times.items()},
        "request_counts": {
            "total": batch.n_total,
            "completed": batch.n_completed,
            "failed": batch.n_failed,
        },
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": batch.request_metadata,
    }


@router.post("")
def create_batch(
    body: BatchCreate, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Run a file of requests (purpose ``batch``) in the background.

    Each line is an object with ``custom_id``, ``method``, ``url`` and ``body``. Answers come in a
    file of the same form, requests that failed in another.
    """
    if body.output_expires_after is not None:
        raise InvalidRequestError(
            "Files do not expire by themselves here; leave 'output_expires_after' out.",
            param="output_expires_after",
            code="unsupported_parameter",
        )
    file = files.get(session, caller.project_id, body.input_file_id, param="input_file_id")
    if file.purpose != files.BATCH:
        raise InvalidRequestError(
            f"File {file.id} has purpose '{file.purpose}'; it must be uploaded with purpose "
            f"'{files.BATCH}'.",
            param="input_file_id",
            code="invalid_file_purpose",
        )
    new = batches.NewBatch(
        project_id=caller.project_id,
        key_id=caller.key_id,
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        metadata=body.metadata,
    )
    batch = batches.create(session, new)
    after_commit(session, "run batches", services.batch_wake.call)
    return _batch_body(batch)


@router.get("")
def list_batches(
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> JsonObject:
    page = batches.list_page(session, caller.project_id, Cursor(after, limit))
    return bodies.list_body(page, _batch_body)


@router.get("/{batch_id}")
def retrieve_batch(batch_id: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    return _batch_body(batches.get(session, caller.project_id, batch_id))


@router.post("/{batch_id}/cancel")
def cancel_batch(batch_id: str, session: WriteSession, caller: CallerDep) -> JsonObject:
    """End a batch; what is answered already still comes in its files."""
    return _batch_body(batches.cancel(session, caller.project_id, batch_id))
