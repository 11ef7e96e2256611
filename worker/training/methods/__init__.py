"""Methods: what becomes trainable on a frozen base. One file each; a new file is a new method."""

from collections.abc import Mapping
from typing import Any, TypeVar

from models.domain.estimates import BaseShape
from worker.training.methods.base import Method, MethodParams, Served
from worker.training.plugins import Registry

_registry: Registry[Method] = Registry(__name__, field="peft", default="lora")
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator that makes a method known; ``ValueError`` if its name is taken."""
    _registry.add(method())
    return method


def get_method(name: str) -> Method:
    """Return a method, or raise `InvalidRequestError` (param ``peft.type``)."""
    return _registry.get(name)


def all_methods() -> Mapping[str, Method]:
    """Return every method by name."""
    return _registry.all()


def parse_params(given: Mapping[str, Any]) -> MethodParams:
    """Return the checked ``peft`` object of a job, or raise `InvalidRequestError` (``peft.…``)."""
    params = _registry.parse(given)
    assert isinstance(params, MethodParams)
    return params


def served(given: Mapping[str, Any]) -> Served:
    """Return how an inference server answers with an adapter of a job's ``peft`` object."""
    params = parse_params(given)
    return get_method(given.get("type", "lora")).served(params)


def virtual_tokens(given: Mapping[str, Any]) -> int:
    """Return how many positions a job's ``peft`` object puts before every row."""
    return get_method(given.get("type", "lora")).virtual_tokens(parse_params(given))


def require_fit(given: Mapping[str, Any], precision: str, shape: BaseShape | None) -> None:
    """Refuse a ``peft`` object that does not go with a base; see `Method.require_fit`."""
    get_method(given.get("type", "lora")).require_fit(parse_params(given), precision, shape)
