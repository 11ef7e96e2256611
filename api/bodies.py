"""Rows as the objects of the API, in OpenAI's form with Tunery's fields after it."""

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

import orjson

from models.domain.base import JsonObject
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.registry.adapters import ResolvedModel
from models.registry.lineage import Ancestor
from models.registry.page import Page
from models.registry.turns import Place
from models.tables import (
    Adapter,
    ApiKey,
    Base,
    BaseModel,
    Checkpoint,
    Event,
    File,
    Job,
    Merge,
    Upload,
    UploadPart,
)

Row = TypeVar("Row", bound=Base)


def list_body(page: Page[Row], render: Callable[[Row], JsonObject]) -> JsonObject:
    """Return a list as the SDK's cursor pages read it; `has_more` is what ends their loop."""
    data = [render(row) for row in page.rows]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": page.has_more,
    }


def file_body(file: File) -> JsonObject:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
        "sha256": file.sha256,
    }


def upload_body(upload: Upload) -> JsonObject:
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": int(upload.created_at),
        "filename": upload.filename,
        "purpose": upload.purpose,
        "status": upload.status,
        "expires_at": int(upload.expires_at),
        "file": None,
    }


def part_body(part: UploadPart) -> JsonObject:
    return {
        "id": part.id,
        "object": "upload.part",
        "created_at": int(part.created_at),
        "upload_id": part.upload_id,
        "bytes": part.bytes,
    }


@lru_cache(4096)
def _spec_body(text: bytes) -> JsonObject:
    """Return what a stored specification is in a job object; what is asked for again is kept."""
    spec = TrainingSpec.model_validate_json(text)
    hyperparameters = spec.hyperparameters.model_dump()
    return {
        "model": spec.init_adapter.name if spec.init_adapter else spec.model,
        "hyperparameters": hyperparameters,
        "method": _method_body(spec, hyperparameters),
        "seed": spec.seed,
        "user_provided_suffix": spec.suffix or None,
        "objective": spec.objective,
        "peft": spec.peft,
        "precision": spec.precision.model_dump(),
        "optimizer": spec.optimizer.model_dump(),
        "max_seq_length": spec.max_seq_length,
        "validation_split": spec.validation_split,
        "on_error": spec.on_error,
        "on_overlong": spec.on_overlong,
        "early_stopping": spec.early_stopping and spec.early_stopping.model_dump(),
        "checkpoint_steps": spec.checkpoint_steps,
        "priority": spec.priority,
        "num_devices": spec.num_devices,
        "packing": spec.packing,
        "base_model": spec.model,
    }


def _method_body(spec: TrainingSpec, hyperparameters: JsonObject) -> JsonObject:
    """Return OpenAI's ``method``: dpo, or supervised for whatever else."""
    if spec.objective.get("type") == "dpo":
        numbers = {**hyperparameters, "beta": spec.objective["beta"]}
        return {"type": "dpo", "dpo": {"hyperparameters": numbers}}
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def job_body(job: Job, organization: str, place: Place | None = None) -> JsonObject:
    """Return OpenAI's job object and Tunery's fields with their resolved values; only to be read.

    The parts that come from the specification are shared between objects.

    Args:
        job: The job.
        organization: The owner's name in names of models.
        place: In the queue, where it waits there.
    """
    error = None
    if job.error_code is not None:
        error = {"code": job.error_code, "message": job.error_message, "param": job.error_param}
    running = job.status == JobStatus.RUNNING
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": organization,
        "status": job.status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": [job.result_file] if job.result_file else [],
        "trained_tokens": job.trained_tokens,
        "error": error,
        "integrations": [],
        "estimated_finish": _seconds(job.estimated_finish) if running else None,
        "metadata": job.request_metadata,
        **_spec_body(orjson.dumps(job.spec)),
        "queue_position": place and place.position,
        "queue_length": place and place.length,
        "step": job.step,
        "total_steps": job.total_steps,
        "started_at": _seconds(job.started_at),
        "attempt": job.attempt,
        "estimate": job.estimate,
        "measured": job.measured,
        "cancel_requested": job.cancel_requested,
        "pause_requested": job.pause_requested,
    }


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def event_body(event: Event) -> JsonObject:
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
        "sequence": event.sequence,
    }


_CHECKPOINT_METRICS = (
    "step",
    "train_loss",
    "train_mean_token_accuracy",
    "valid_loss",
    "valid_mean_token_accuracy",
    "full_valid_loss",
    "full_valid_mean_token_accuracy",
)


def checkpoint_body(checkpoint: Checkpoint) -> JsonObject:
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "step_number": checkpoint.step,
        "metrics": {
            name: checkpoint.metrics[name]
            for name in _CHECKPOINT_METRICS
            if name in checkpoint.metrics
        },
    }


def base_model_body(model: BaseModel) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": "tunery",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_length,
        "fingerprint": model.fingerprint,
    }


def adapter_body(adapter: Adapter) -> JsonObject:
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at),
        "owned_by": adapter.project_id,
        "root": adapter.base_model,
        "parent": adapter.base_model,
        "job_id": adapter.job_id,
        "digest": adapter.digest,
    }


def made_body(adapter: Adapter) -> JsonObject:
    """Return an adapter with how it was made, from its manifest."""
    manifest = adapter.manifest
    return adapter_body(adapter) | {
        "object": "adapter",
        "bytes": adapter.bytes,
        "base_fingerprint": manifest["base_fingerprint"],
        "method": manifest["method"],
        "objective": manifest["objective"],
        "precision": manifest["precision"],
        "step": manifest["step"],
        "versions": manifest["versions"],
        "merged": is_merged(adapter),
        "archived_at": _seconds(adapter.archived_at),
    }


def is_merged(adapter: Adapter) -> bool:
    """Tell whether a merged copy of the base answers, by its owner's wish or by its method."""
    return adapter.merged or adapter.manifest.get("served") == "merged"


def merge_body(merge: Merge) -> JsonObject:
    return {
        "id": merge.id,
        "object": "adapter.merge",
        "created_at": int(merge.created_at),
        "model": merge.model,
        "status": merge.status,
        "file_id": merge.file_id,
        "error": merge.error,
    }


def ancestor_body(ancestor: Ancestor) -> JsonObject:
    job = ancestor.job
    return {
        "model": ancestor.name,
        "digest": ancestor.digest,
        "deleted": not ancestor.is_live,
        "job_id": job and job.id,
        "created_at": job and int(job.created_at),
        "training_file": job and job.training_file,
        "training_filename": ancestor.training_file and ancestor.training_file.filename,
        "validation_file": job and job.validation_file,
        "validation_filename": ancestor.validation_file and ancestor.validation_file.filename,
    }


def resolved_body(model: ResolvedModel, project_id: str) -> JsonObject:
    return {
        "id": model.name,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": "tunery" if model.adapter is None else project_id,
        "root": model.base_model,
        "parent": None if model.adapter is None else model.base_model,
        "job_id": model.job_id,
        "digest": model.adapter and model.adapter.digest,
    }


def key_body(key: ApiKey) -> JsonObject:
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "prefix": key.prefix,
        "project_id": key.project_id,
        "scopes": key.scopes,
        "created_at": int(key.created_at),
        "expires_at": _seconds(key.expires_at),
        "revoked_at": _seconds(key.revoked_at),
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
    }
