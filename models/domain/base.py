"""The strict base of every domain type, and the one string type that is safe to store."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

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
"""Text that every database takes: PostgreSQL refuses NUL, and a lone surrogate cannot be encoded."""
