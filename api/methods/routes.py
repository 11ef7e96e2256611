"""``/v1/methods``: what a job's ``peft`` may be, and what goes with what."""

from fastapi import APIRouter

from api.methods.catalogue import catalogue
from models.domain.base import JsonObject

router = APIRouter(prefix="/methods", tags=["fine-tuning"])


@router.get("")
def list_methods() -> JsonObject:
    """List the training methods with their parameters as JSON schema, and the objectives.

    ``precisions`` and ``families`` say on which bases a method works, ``served`` how an inference
    server answers with what it makes: ``batched``, ``merged`` or ``own``.
    """
    return catalogue()
