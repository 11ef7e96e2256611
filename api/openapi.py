"""What the OpenAPI document says beside the types: examples, OpenAI's error object, statuses."""

from typing import Any

from fastapi import FastAPI

from api.openapi_examples import EXAMPLES
from models.domain.base import JsonObject

_ERROR: JsonObject = {
    "type": "object",
    "title": "Error",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ALWAYS = {
    400: "The request is at fault; `param` names the field.",
    401: "No key, or not a valid one.",
    403: "The key lacks the scope.",
    429: "Full, or a limit is reached; try again after `Retry-After` seconds.",
    503: "A part of the service is not there right now; try again after `Retry-After` seconds.",
}
_NOT_FOUND = "Nothing of this project has the name."
_TOO_LARGE = "The body, or what would come of it, is larger than this service or project accepts."
_UNUSABLE = {
    409: "Two valid things do not fit each other, or a request with this key is under way.",
    422: "What is named exists and cannot be used.",
}


def install(app: FastAPI) -> None:
    """Have the document of `app` give every operation's errors, and an example of its body."""
    build = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = build()
            document["components"]["schemas"] |= {"Error": _ERROR}
            for name in ("HTTPValidationError", "ValidationError"):
                document["components"]["schemas"].pop(name, None)
            for path, operations in document["paths"].items():
                if path.startswith("/v1/"):
                    for method, operation in operations.items():
                        _describe(path, method, operation)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]


def _describe(path: str, method: str, operation: JsonObject) -> None:
    errors = dict(_ALWAYS)
    if "{" in path or "requestBody" in operation or "parameters" in operation:
        errors[404] = _NOT_FOUND
    if "requestBody" in operation or method == "post":
        errors[413] = _TOO_LARGE
    if method == "post":
        errors |= _UNUSABLE
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content and path in EXAMPLES:
        content["application/json"]["example"] = EXAMPLES[path]
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own, which this service answers as 400
    for status, description in sorted(errors.items()):
        responses[str(status)] = {
            "description": description,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
