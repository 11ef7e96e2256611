"""``/v1/adapters``: fine-tuned models with how they were made and where they come from."""

from typing import Annotated

from fastapi import APIRouter, Query

from api import bodies
from api.deps import After, CallerDep, ReadSession, Text
from api.model_card import model_card
from models.domain.base import JsonObject
from models.registry import adapters
from models.registry.page import Cursor

router = APIRouter(prefix="/adapters", tags=["models"])


@router.get("")
def list_adapters(
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    base_model: str | None = None,
    q: Text = "",
) -> JsonObject:
    """List the published adapters of the project, newest first; ``q`` is a part of the name."""
    page = adapters.list_page(
        session, caller.project_id, Cursor(after, limit), base_model=base_model, text=q
    )
    return bodies.list_body(page, bodies.made_body)


@router.get("/{model:path}")
def retrieve_adapter(model: str, session: ReadSession, caller: CallerDep) -> JsonObject:
    """Show an adapter or a checkpoint with the jobs and data that led to it, its own job first.

    ``successors`` are the jobs that went on from it.
    """
    return model_card(session, caller.project_id, model)
