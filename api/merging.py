"""Which adapters can be added to the weights of their base, and which are answered in one way."""

from dataclasses import dataclass

from sqlalchemy.orm import Session

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.tables import Adapter, BaseModel, Job
from worker.training import methods


@dataclass(frozen=True, slots=True)
class Fixed:
    """Why an adapter is answered in one way only, as the rest of a sentence, and a code."""

    why: str
    code: str


def can_merge(session: Session, adapter: Adapter) -> bool:
    """Tell whether what its method trained is a change of the weights of the base."""
    if adapter.manifest.get("served") == "own":
        return False
    peft = _peft(session, adapter)
    return methods.get_method(peft.get("type", "lora")).merges(methods.parse_params(peft))


def family_of(session: Session, adapter: Adapter) -> str | None:
    """Return the kind of its base model; None where no process has seen the model's files yet."""
    shape = session.get_one(BaseModel, adapter.base_model).shape
    return None if shape is None else BaseShape.model_validate(shape).family


def fixed(session: Session, adapter: Adapter) -> Fixed | None:
    """Return why an adapter cannot be answered both merged and unmerged, or None where it can."""
    title = methods.get_method(_peft(session, adapter).get("type", "lora")).title
    if adapter.manifest.get("served") == "merged":
        return Fixed(
            f"is always answered merged: {title} computes with weights that no batch shares.",
            "always_merged",
        )
    if not can_merge(session, adapter):
        return Fixed(
            f"cannot be merged: what {title} adds is no change of the base's weights.",
            "not_mergeable",
        )
    if family_of(session, adapter) == "encoder":
        return Fixed("is an encoder's, whose adapters are not answered merged.", "not_mergeable")
    return None


def _peft(session: Session, adapter: Adapter) -> JsonObject:
    """Return the ``peft`` of the job that made it; what came from outside has defaults."""
    if adapter.job_id is None:
        return {"type": adapter.manifest.get("method", "lora")}
    peft: JsonObject = session.get_one(Job, adapter.job_id).spec["peft"]
    return peft
