"""One registry for methods and for objectives: a plug-in is a file, found by being there.

The API reads parameter classes through this module, so it imports nothing of the tensor libraries.
"""

import pkgutil
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from models.domain.base import Parameters
from models.errors import InvalidRequestError

_CODES = {"missing": "missing_required_parameter", "unknown_field": "unknown_parameter"}


class Plugin:
    """What a registry needs to know: the value of ``type``, and the form that goes with it."""

    name: ClassVar[str]
    Params: ClassVar[type[Parameters]]


P = TypeVar("P", bound=Plugin)


class Registry(Generic[P]):
    """The plug-ins of one package by name.

    Args:
        package: Dotted name of the package whose modules hold the plug-ins.
        field: Request field that carries their parameters, e.g. ``"peft"``; errors name it.
        default: Name that a request without ``type`` stands for.
    """

    def __init__(self, package: str, field: str, default: str) -> None:
        self._package = package
        self._field = field
        self._default = default
        self._found: dict[str, P] = {}
        self._complete = False

    def add(self, plugin: P) -> None:
        """Register a plug-in; ``ValueError`` if its name is taken."""
        other = self._found.get(plugin.name)
        if other is not None:
            raise ValueError(
                f"{self._field} type {plugin.name!r} is registered twice: by "
                f"{type(other).__module__} and {type(plugin).__module__}."
            )
        self._found[plugin.name] = plugin

    def all(self) -> Mapping[str, P]:
        """Return every plug-in by name, in order of the names."""
        if not self._complete:
            paths = import_module(self._package).__path__
            for module in pkgutil.iter_modules(paths):
                import_module(f"{self._package}.{module.name}")
            self._complete = True
        return dict(sorted(self._found.items()))

    def get(self, name: object) -> P:
        """Return one plug-in, or raise `InvalidRequestError` listing the names there are."""
        known = self.all()
        if isinstance(name, str) and name in known:
            return known[name]
        near = get_close_matches(str(name), known, n=1, cutoff=0.6)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise InvalidRequestError(
            f"{self._field}.type: {str(name)[:100]!r} is not known. Known types: "
            f"{', '.join(known)}.{hint}",
            param=f"{self._field}.type",
        )

    def parse(self, given: Mapping[str, Any]) -> Parameters:
        """Return the checked parameters of the plug-in that ``given["type"]`` names.

        Raises:
            InvalidRequestError: the type is unknown, a field is unknown or has a bad value;
                ``param`` is the first one, e.g. ``"peft.r"``, the message tells of all of them.
        """
        plugin = self.get(given.get("type", self._default))
        try:
            return plugin.Params.model_validate(dict(given))
        except ValidationError as error:
            raise self._explained(error.errors(include_url=False)) from error

    def _explained(self, findings: Sequence[Any]) -> InvalidRequestError:
        reasons: dict[str, list[str]] = {}
        for finding in findings:
            # The branches of a union appear as parts such as "literal['all-linear']".
            path = [str(part) for part in finding["loc"] if str(part).isidentifier()]
            if finding["type"] == "unknown_field":
                path.append(finding["ctx"]["field"])
            reason = str(finding["msg"]).removeprefix("Value error, ").removesuffix(".")
            reasons.setdefault(".".join([self._field, *path]), []).append(reason)
        sentences = [f"{where}: {', or '.join(these)}" for where, these in reasons.items()]
        return InvalidRequestError(
            " ".join(text if text.endswith("?") else f"{text}." for text in sentences),
            param=next(iter(reasons)),
            code=_CODES.get(findings[0]["type"]),
        )
