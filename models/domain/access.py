"""What a key may do."""

from collections.abc import Iterable
from enum import StrEnum


class Scope(StrEnum):
    """A right of an API key within its project; `ORGANIZATION` is one in its organisation."""

    READ = "read"
    TRAIN = "train"
    INFER = "infer"
    ADMIN = "admin"
    ORGANIZATION = "organization"


_IMPLIED: dict[Scope, frozenset[Scope]] = {
    Scope.READ: frozenset({Scope.READ}),
    Scope.TRAIN: frozenset({Scope.TRAIN, Scope.READ}),
    Scope.INFER: frozenset({Scope.INFER}),
    Scope.ADMIN: frozenset(Scope) - {Scope.ORGANIZATION},
    Scope.ORGANIZATION: frozenset(Scope),
}


def allows(scopes: Iterable[str], needed: Scope) -> bool:
    """Whether a key with `scopes` may do what needs `needed`; `train` can also read."""
    return any(needed in _IMPLIED[Scope(scope)] for scope in scopes)
