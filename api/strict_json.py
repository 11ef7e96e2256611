"""JSON bodies as RFC 8259 has them: what Python's own parser also takes is refused with 400.

The standard library reads ``NaN``, lone surrogates such as ``"\\ud800"`` and any depth. Such values
pass the first validation and break whatever encodes them later: an answer, a log line, a request to
an inference server. The NUL character is JSON, but no text of PostgreSQL.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from models.errors import InvalidRequestError, TuneryError

_NUL = "\x00"
_ESCAPED_NUL = b"\\u0000"


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Return the parsed body; raises as `loads`, which FastAPI reports."""
        if not hasattr(self, "_json"):
            self._json = loads(await self.body())
        return self._json


def loads(body: bytes) -> Any:
    """Return the parsed body.

    Raises:
        json.JSONDecodeError: it is no JSON.
        InvalidRequestError: a text holds the NUL character; `param` says which.
    """
    value = orjson.loads(body)
    if _ESCAPED_NUL in body and (place := _place_of_nul(value, "")) is not None:
        raise InvalidRequestError(
            f"{place or 'The body'}: must not contain the NUL character (U+0000).",
            param=place or None,
        )
    return value


def _place_of_nul(value: Any, place: str) -> str | None:
    """Return the path of the first text with NUL; that of the object where it is a name."""
    if isinstance(value, str):
        return place if _NUL in value else None
    if isinstance(value, dict):
        if any(_NUL in name for name in value):
            return place
        inner = ((each, f"{place}.{name}" if place else name) for name, each in value.items())
    elif isinstance(value, list):
        inner = ((each, f"{place}[{at}]") for at, each in enumerate(value))
    else:
        return None
    found = (_place_of_nul(each, where) for each, where in inner)
    return next((each for each in found if each is not None), None)


class StrictJsonRoute(APIRoute):
    """A route whose JSON body is parsed strictly, at most 1,024 levels deep."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(_StrictRequest(request.scope, request.receive))
            except HTTPException as error:
                # FastAPI wraps whatever a body raises.
                if isinstance(error.__cause__, TuneryError):
                    raise error.__cause__ from None
                raise

        return handle
