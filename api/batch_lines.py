"""The file of a batch: one request a line, and what is wrong with it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from models.domain.base import JsonObject

MAX_REQUESTS = 50_000
MAX_ERRORS = 100
MAX_CUSTOM_ID = 512


@dataclass(frozen=True, slots=True)
class Line:
    """One request; `number` counts the file's lines from 1."""

    number: int
    custom_id: str
    body: JsonObject


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file holds: how many requests, the model if all name the same, the errors."""

    n_requests: int
    model: str | None
    errors: list[JsonObject]


def read(path: Path) -> Iterator[Line]:
    """Yield the requests of a file that `check` has found to be in order."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                line = orjson.loads(raw)
                yield Line(number, line["custom_id"], line["body"])


def check(path: Path, endpoint: str) -> Checked:
    """Check every line of a file, and report up to `MAX_ERRORS` errors with their lines."""
    errors: list[JsonObject] = []
    models: set[str] = set()
    seen: set[str] = set()
    n_requests = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            n_requests += 1
            fault = _fault(raw, endpoint, seen, models)
            if fault is not None and len(errors) < MAX_ERRORS:
                errors.append(fault | {"line": number})
    if n_requests == 0:
        errors.append(_error("empty_file", "The file has no requests.", None) | {"line": None})
    if n_requests > MAX_REQUESTS:
        message = f"The file has {n_requests:,} requests; the most are {MAX_REQUESTS:,}. Split it."
        errors.append(_error("too_many_requests", message, None) | {"line": None})
    return Checked(n_requests, models.pop() if len(models) == 1 else None, errors)


def missing_file() -> Checked:
    """Return what is found in a file that is gone from the store."""
    message = "The input file is gone. Upload it again."
    return Checked(0, None, [_error("file_missing", message, "input_file_id") | {"line": None}])


def _error(code: str, message: str, param: str | None) -> JsonObject:
    return {"code": code, "message": message, "param": param}


def _fault(raw: bytes, endpoint: str, seen: set[str], models: set[str]) -> JsonObject | None:
    try:
        line: Any = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return _error("invalid_json_line", f"The line is not valid JSON: {error}.", None)
    if not isinstance(line, dict):
        return _error("invalid_json_line", "The line must be a JSON object.", None)
    custom_id, body = line.get("custom_id"), line.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        message = f"'custom_id' must be a string of 1 to {MAX_CUSTOM_ID} characters."
        return _error("missing_required_parameter", message, "custom_id")
    if custom_id in seen:
        message = f"The custom_id {custom_id!r} stands on an earlier line; make each unique."
        return _error("duplicate_custom_id", message, "custom_id")
    seen.add(custom_id)
    if line.get("method") != "POST":
        return _error("invalid_method", "'method' must be \"POST\".", "method")
    if line.get("url") != endpoint:
        message = f"'url' must be {endpoint!r}, the endpoint of this batch."
        return _error("mismatched_endpoint", message, "url")
    if not isinstance(body, dict):
        return _error("missing_required_parameter", "'body' must be an object.", "body")
    if body.get("stream"):
        message = "A request of a batch cannot be streamed; leave 'stream' out."
        return _error("invalid_value", message, "body.stream")
    models.add(str(body.get("model")))
    return None
