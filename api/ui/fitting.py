"""What the service refuses on each base model, so that a form greys it and says why."""

from collections.abc import Callable, Mapping, Sequence

from models.domain.base import JsonObject
from models.domain.estimates import BaseShape
from models.errors import InvalidRequestError
from worker.training import methods, objectives


def refusals(shapes: Mapping[str, BaseShape | None], precisions: Sequence[str]) -> JsonObject:
    """Return the reasons of refusal, as `api.actions.check_job` would give them.

    Args:
        shapes: Of each base model by its name; None where no process has seen its files yet, so
            that nothing is refused on its account.
        precisions: How a base may be held.

    Returns:
        ``{"bases": {name: {"peft.type": {method: reason}, "objective.type": {objective: reason}}},
        "precisions": {method: {precision: reason}}}``, without what is not refused.
    """
    of_methods = {
        method: _reasons({each: _fits(method, each, None) for each in precisions})
        for method in methods.all_methods()
    }
    bases = {name: _of_shape(shape) for name, shape in shapes.items() if shape is not None}
    return {"bases": bases, "precisions": of_methods}


def _of_shape(shape: BaseShape) -> JsonObject:
    found = objectives.all_objectives()
    return {
        "peft.type": _reasons(
            {
                name: _fits(name, sorted(method.precisions)[0], shape)
                for name, method in methods.all_methods().items()
            }
        ),
        "objective.type": _reasons(
            {name: _suits(each.require_base, shape) for name, each in found.items()}
        ),
    }


def _fits(method: str, precision: str, shape: BaseShape | None) -> Callable[[], None]:
    return lambda: methods.require_fit({"type": method}, precision, shape)


def _suits(require: Callable[..., None], shape: BaseShape) -> Callable[[], None]:
    return lambda: require(shape.family)


def _reasons(checks: Mapping[str, Callable[[], None]]) -> dict[str, str]:
    """Return why each check that refuses does so, without the name of the field."""
    reasons = {}
    for name, check in checks.items():
        try:
            check()
        except InvalidRequestError as error:
            reasons[name] = str(error).removeprefix(f"{error.param}: ")
    return reasons
