"""Objectives: what the loss is. One file each; a new file is a new objective."""

from collections.abc import Mapping
from typing import Any, TypeVar

from worker.training.objectives.base import Objective, ObjectiveParams
from worker.training.plugins import Registry

_registry: Registry[Objective] = Registry(__name__, field="objective", default="sft")
Kind = TypeVar("Kind", bound=type[Objective])


def register(objective: Kind) -> Kind:
    """Class decorator that makes an objective known; ``ValueError`` if its name is taken."""
    _registry.add(objective())
    return objective


def get_objective(name: str) -> Objective:
    """Return an objective, or raise `InvalidRequestError` (param ``objective.type``)."""
    return _registry.get(name)


def all_objectives() -> Mapping[str, Objective]:
    """Return every objective by name."""
    return _registry.all()


def parse_params(given: Mapping[str, Any]) -> ObjectiveParams:
    """Return the checked ``objective`` object of a job, or raise `InvalidRequestError`."""
    params = _registry.parse(given)
    assert isinstance(params, ObjectiveParams)
    return params


def resolve(given: Mapping[str, Any]) -> tuple[Objective, ObjectiveParams]:
    """Return the objective of a job and its checked parameters; raises as `parse_params`."""
    params = parse_params(given)
    name: str = params.type  # type: ignore[attr-defined]
    return get_objective(name), params
