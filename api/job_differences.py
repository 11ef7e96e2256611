"""What jobs differ in: of what was asked for, and of what came of it."""

from collections.abc import Iterator, Sequence

from pydantic import BaseModel

from models.domain.base import JsonObject
from models.domain.training import Optimizer, Precision
from worker.training import methods, objectives

OWN = frozenset(
    {
        *("id", "created_at", "finished_at", "started_at", "estimated_finish", "organization_id"),
        *("fine_tuned_model", "result_files", "method", "attempt"),
        *("cancel_requested", "pause_requested", "estimate", "measured"),
    }
)
"""Fields that are of one job alone, or say again what another says."""
COURSE = frozenset({"status", "step", "total_steps", "trained_tokens", "error"})
"""Fields that tell how a job went."""


def differences(jobs: Sequence[JsonObject]) -> list[tuple[str, list[object]]]:
    """Return (field, its value in each job) where job objects differ.

    Nested fields are named with dots; a value that a job does not have is None.
    """
    return [(name, values) for name, values in _rows(jobs) if differ(values)]


def settings(jobs: Sequence[JsonObject]) -> list[tuple[str, list[object]]]:
    """Return (field, its value in each job) of all that was asked for, as `differences` does."""
    return [row for row in _rows(jobs) if row[0].partition(".")[0] not in COURSE]


def differ(values: Sequence[object]) -> bool:
    return any(each != values[0] for each in values)


def _rows(jobs: Sequence[JsonObject]) -> list[tuple[str, list[object]]]:
    flat = [dict(_flat(job)) for job in jobs]
    names = list(dict.fromkeys(name for each in flat for name in each))
    return [(name, [each.get(name) for each in flat]) for name in names]


def _flat(value: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, item in value.items():
        if not prefix and name in OWN:
            continue
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item


def default_differences(job: JsonObject) -> list[str]:
    """Return the dotted names of a job's settings whose value is not the usual one.

    Those without a usual value, such as the data, are not among them.
    """
    usual: JsonObject = {
        "precision": Precision().model_dump(),
        "validation_split": 0.0,
        "validation_file": None,
        "max_seq_length": 2048,
        "on_error": "fail",
        "on_overlong": "error",
        "early_stopping": None,
        "priority": 0,
        "num_devices": 1,
        "packing": True,
        "peft": _defaults(methods.get_method(job["peft"]["type"]).Params),
        "objective": _defaults(objectives.get_objective(job["objective"]["type"]).Params),
        "optimizer": Optimizer().model_dump(exclude={"learning_rate"}),
    }
    given = {name: job.get(name) for name in usual}
    flat = dict(_flat(given))
    return [name for name, value in _flat(usual) if name in flat and flat[name] != value]


def _defaults(params: type[BaseModel]) -> JsonObject:
    """Return the values that parameters have by themselves, those without one left out."""
    given = {
        name: field.get_default(call_default_factory=True)
        for name, field in params.model_fields.items()
        if not field.is_required()
    }
    return params.model_construct(**given).model_dump(mode="json", include=set(given))
