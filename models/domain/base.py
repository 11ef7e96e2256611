"""The strict base of every domain type, and the one string type that is safe to store."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

JsonObject = dict[str, Any]


class Frozen(BaseModel):
    """Immutable, strict about unknown fields, and free of NaN and Infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _storable(value: str) -> str:
    if "\x00" in value:
        raise ValueError("must not contain the NUL character (U+0000)")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must not contain a lone surrogate; it is no valid Unicode text") from None
    return value


Text = Annotated[str, AfterValidator(_storable)]
"""Text that every database takes: no NUL (PostgreSQL), no lone surrogate (not encodable)."""


class Parameters(Frozen):
    """A form filled in by hand: an unknown field is answered with the nearest known one."""

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, value: Any) -> Any:
        if isinstance(value, dict):
            require_known(cls, value)
        return value


def require_known(model: type[BaseModel], value: JsonObject) -> None:
    """Raise the error that suggests a name, if `value` has a field that `model` does not have."""
    known = _known_fields(model)
    for name in value:
        if name not in known:
            raise unknown_field(str(name), known)


@cache
def _known_fields(model: type[BaseModel]) -> Sequence[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def unknown_field(name: str, known: Sequence[str]) -> PydanticCustomError:
    """Return the error for a field that does not exist, suggesting the nearest of `known`."""
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    remedy = f"Did you mean '{near[0]}'?" if near else f"Known fields: {', '.join(known)}."
    return PydanticCustomError(
        "unknown_field",
        "Unknown field '{field}'. {remedy}",
        {"field": name[:100], "remedy": remedy},
    )
