"""What two jobs differ in: what was asked for, and what came of it."""

from collections.abc import Iterator

from models.domain.base import JsonObject

OWN = frozenset(
    {
        *("id", "created_at", "finished_at", "started_at", "estimated_finish", "organization_id"),
        *("fine_tuned_model", "result_files", "method", "attempt"),
        *("cancel_requested", "pause_requested", "estimate", "measured"),
    }
)
"""Fields that are of one job alone, or say again what another says."""


def differences(first: JsonObject, second: JsonObject) -> list[tuple[str, object, object]]:
    """Return (field, value in the first, value in the second) where two job objects differ.

    Nested fields are named with dots; a value that one does not have is None.
    """
    flat = [dict(_flat(job)) for job in (first, second)]
    names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
    rows = [(name, flat[0].get(name), flat[1].get(name)) for name in names]
    return [row for row in rows if row[1] != row[2]]


def _flat(value: JsonObject, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, item in value.items():
        if not prefix and name in OWN:
            continue
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", item
