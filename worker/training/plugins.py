"""One registry for methods and for objectives: a plug-in is a file, found by being there.

The API reads parameter classes through this module, so it imports nothing of the tensor libraries.
"""

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import ValidationError

from models.domain.base import Parameters
from models.errors import InvalidRequestError
from models.explain import explain


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
        self._found = dict(sorted({**self._found, plugin.name: plugin}.items()))

    def all(self) -> Mapping[str, P]:
        """Return every plug-in by name, in order of the names."""
        if not self._complete:
            paths = import_module(self._package).__path__
            for module in pkgutil.iter_modules(paths):
                import_module(f"{self._package}.{module.name}")
            self._complete = True
        return MappingProxyType(self._found)

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
            raise explain(error.errors(include_url=False), self._field) from error
