"""Errors as responses: every non-2xx body is OpenAI's error object."""

from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from starlette.exceptions import HTTPException

from models.errors import (
    InvalidRequestError,
    NotFoundError,
    PayloadTooLargeError,
    QuotaError,
    TuneryError,
    UnavailableError,
)
from models.explain import explain

log = structlog.get_logger(__name__)


def error_body(error: TuneryError) -> dict[str, Any]:
    """Return OpenAI's error object; all four keys are always there."""
    return {
        "error": {
            "message": error.message,
            "type": error.type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_response(error: TuneryError) -> JSONResponse:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status_code == 409 and error.retry_after is None:
        headers["x-should-retry"] = "false"  # the SDK retries every 409 unless told not to
    if isinstance(error, QuotaError):
        headers["x-should-retry"] = "false"
    if error.status_code == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status_code, headers)


def tunery_error_response(error: TuneryError) -> JSONResponse:
    """Answer with an error that ended a request; the service's own are logged too."""
    if error.status_code >= 500:
        log.warning("request_failed", code=error.code, error=error.message)
    return error_response(error)


def database_error_response(error: DBAPIError) -> JSONResponse | None:
    """Answer for the database where it is down or refuses a value; None for any other error."""
    if isinstance(error, OperationalError):
        log.error("database_unavailable", error=str(error.orig))
        return error_response(
            UnavailableError("The database does not answer right now.", retry_after=5)
        )
    if isinstance(error, DataError):
        # Bodies are checked before; this is a NUL in a path or a query, which PostgreSQL refuses.
        log.warning("value_refused_by_database", error=str(error.orig))
        return error_response(
            InvalidRequestError("A value in the URL holds a character that cannot be stored.")
        )
    return None


def install_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(TuneryError)
    async def on_tunery_error(_: Request, error: TuneryError) -> JSONResponse:
        return tunery_error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return error_response(explain(_without_place(error.errors())))

    @app.exception_handler(HTTPException)
    async def on_http_exception(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(_from_http(request, error))

    @app.exception_handler(RecursionError)
    async def on_recursion(_: Request, __: RecursionError) -> JSONResponse:
        return error_response(InvalidRequestError("The body is nested too deep.", code="too_deep"))

    @app.exception_handler(DBAPIError)
    async def on_database_error(_: Request, error: DBAPIError) -> JSONResponse:
        response = database_error_response(error)
        if response is None:
            raise error
        return response


def _without_place(findings: Sequence[Any]) -> list[Any]:
    """Drop FastAPI's first part of a location: ``body``, ``query``, …

    For a body that is no JSON the rest is a position in the text, which is no parameter.
    """
    return [
        finding | {"loc": (), "msg": _not_json(finding)}
        if finding["type"] == "json_invalid"
        else finding | {"loc": finding["loc"][1:]}
        for finding in findings
    ]


def _not_json(finding: dict[str, Any]) -> str:
    where = finding["loc"][1]
    return f"The body is not valid JSON at character {where}: {finding['ctx']['error']}"


def _from_http(request: Request, error: HTTPException) -> TuneryError:
    where = f"{request.method} {request.url.path[:200]}"
    match error.status_code:
        case 404:
            return NotFoundError(f"Invalid URL ({where}).", code="unknown_url")
        case 405:
            refused = InvalidRequestError(f"Not allowed to {where}.", code="method_not_allowed")
            refused.status_code = 405  # type: ignore[misc]
            return refused
        case 413:
            return PayloadTooLargeError("The body is larger than this service accepts.")
        case _:
            return InvalidRequestError(str(error.detail), code="invalid_request")
