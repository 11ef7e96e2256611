"""A fine-tuned model with how it was made: the same for the API and for its page."""

from sqlalchemy.orm import Session

from api import bodies, merging
from models.domain.base import JsonObject
from models.domain.training import TrainingSpec
from models.errors import InvalidRequestError
from models.registry import adapters, lineage, metrics
from models.tables import Adapter
from worker.training import methods
from worker.training.methods.base import Served


def model_card(session: Session, project_id: str, name: str) -> JsonObject:
    """Return an adapter or a checkpoint with its figures, its lineage and its successors.

    ``metrics`` are those of the step whose weights it holds. ``bytes`` is None for a checkpoint.
    ``can_choose_merged`` says whether ``merged``, how it is answered, can be changed.

    Raises:
        NotFoundError: this project has no such model.
        InvalidRequestError: the name is that of a base model.
    """
    model = adapters.resolve_own(session, project_id, name)
    chain = lineage.ancestry(session, project_id, model)
    adapter = session.get(Adapter, name)
    if adapter is not None and adapter.job_id is None:
        return bodies.made_body(adapter) | {
            "is_checkpoint": False,
            "can_choose_merged": merging.fixed(session, adapter) is None,
            "lineage": [],
            "successors": [],
        }
    if not chain or (job := chain[0].job) is None:
        raise InvalidRequestError(
            f"{name!r} is a base model, which no job has made. Ask for it at /v1/models.",
            param="model",
            code="model_not_fine_tuned",
        )
    spec = TrainingSpec.model_validate(job.spec)
    step = adapters.step_of(session, name)
    point = metrics.at(session, job.id, step)
    return bodies.resolved_body(model, project_id) | {
        "object": "adapter",
        "is_checkpoint": adapter is None,
        "bytes": adapter and adapter.bytes,
        "merged": (
            methods.served(spec.peft) is Served.MERGED
            if adapter is None
            else bodies.is_merged(adapter)
        ),
        "can_choose_merged": adapter is not None and merging.fixed(session, adapter) is None,
        "base_fingerprint": model.adapter and model.adapter.base_fingerprint,
        "method": spec.peft["type"],
        "objective": spec.objective["type"],
        "precision": spec.precision.model_dump(mode="json"),
        "step": step,
        "total_steps": job.total_steps,
        "metrics": point and point.model_dump(exclude_none=True),
        "versions": adapter and adapter.manifest["versions"],
        "lineage": [bodies.ancestor_body(each) for each in chain],
        "successors": [
            {
                "job_id": each.id,
                "status": each.status,
                "created_at": int(each.created_at),
                "fine_tuned_model": each.fine_tuned_model,
            }
            for each in lineage.successors(session, project_id, model)
        ],
    }
