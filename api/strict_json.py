"""JSON bodies as RFC 8259 has them: what Python's own parser also takes is refused with 400.

The standard library reads ``NaN``, lone surrogates such as ``"\\ud800"`` and any depth. Such values
pass the first validation and break whatever encodes them later: an answer, a log line, a request to
an inference server.
"""

from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Request, Response
from fastapi.routing import APIRoute


class _StrictRequest(Request):
    async def json(self) -> Any:
        """Return the parsed body; raises `json.JSONDecodeError`, which FastAPI reports."""
        if not hasattr(self, "_json"):
            self._json = orjson.loads(await self.body())
        return self._json


class StrictJsonRoute(APIRoute):
    """A route whose JSON body is parsed strictly, at most 1,024 levels deep."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(_StrictRequest(request.scope, request.receive))

        return handle
