"""Every non-2xx body is OpenAI's error object, whoever found the error."""

import json

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import DataError, OperationalError

from api.errors import error_body, error_response
from models.db import Database
from models.errors import (
    AuthenticationError,
    CapacityError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    TuneryError,
)
from models.registry import tenancy
from tests.api.calls import chat, expect

JSON = {"content-type": "application/json"}


def test_a_body_has_all_four_keys_even_when_they_are_null() -> None:
    assert error_body(NotFoundError("Gone.")) == {
        "error": {
            "message": "Gone.",
            "type": "not_found_error",
            "param": None,
            "code": "not_found",
        }
    }


@pytest.mark.parametrize(
    ("error", "name", "value"),
    [
        (CapacityError("Full.", retry_after=4), "retry-after", "4"),
        (ConflictError("No fit."), "x-should-retry", "false"),
        (AuthenticationError("Who?"), "www-authenticate", "Bearer"),
        (InvalidRequestError("Bad."), "retry-after", None),
        (InvalidRequestError("Bad."), "x-should-retry", None),
    ],
)
def test_headers_tell_the_sdk_whether_to_try_again(
    error: TuneryError, name: str, value: str | None
) -> None:
    response = error_response(error)
    assert response.status_code == error.status_code
    assert response.headers.get(name) == value
    assert json.loads(bytes(response.body)) == error_body(error)


@pytest.mark.parametrize("path", ["/v1/nothing", "/", "/v1", "/v1/files/a/b/c", "/v2/models"])
def test_an_unknown_url_is_404(client: TestClient, path: str) -> None:
    assert f"GET {path}" in expect(client.get(path), 404, None, "unknown_url")


def test_a_very_long_url_is_not_repeated_in_full(client: TestClient) -> None:
    message = expect(client.get("/v1/nothing/" + "x" * 5000), 404, None, "unknown_url")
    assert len(message) < 300


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/files"),
        ("DELETE", "/v1/fine_tuning/jobs"),
        ("PUT", "/v1/chat/completions"),
    ],
)
def test_a_wrong_method_is_405(client: TestClient, method: str, path: str) -> None:
    response = client.request(method, path)
    assert method in expect(response, 405, None, "method_not_allowed")


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer nonsense", "Basic YTpi"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/files", "/v1/fine_tuning/jobs"])
def test_without_a_valid_key_every_route_is_401(
    client: TestClient, header: str | None, path: str
) -> None:
    del client.headers["authorization"]
    response = client.get(path, headers={} if header is None else {"authorization": header})
    expect(response, 401, None, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_revoked_key_gets_the_same_answer_as_an_unknown_one(
    client: TestClient, database: Database
) -> None:
    with database.write() as session:
        tenancy.revoke_key(session, tenancy.list_keys(session)[0].id)
    revoked = expect(client.get("/v1/models"), 401, None, "invalid_api_key")
    client.headers["authorization"] = "Bearer sk-tunery-never"
    assert expect(client.get("/v1/models"), 401, None, "invalid_api_key") == revoked


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"{not json", None, "invalid_json"),
        (b"", None, "missing_required_parameter"),
        (b"[]", None, "invalid_value"),
        (b"null", None, "invalid_value"),
        (b'"text"', None, "invalid_value"),
        (b"{}", "model", "missing_required_parameter"),
        (b'{"model": "base"}', "messages", "missing_required_parameter"),
        (b'{"model": "base", "messages": [], "top_p": NaN}', None, "invalid_json"),
    ],
)
def test_a_malformed_body_names_what_is_wrong(
    client: TestClient, body: bytes, param: str | None, code: str
) -> None:
    expect(client.post("/v1/chat/completions", content=body, headers=JSON), 400, param, code)


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_a_body_that_is_nested_without_end_is_400(client: TestClient, opening: bytes) -> None:
    body = opening * 12_000
    for path in ("/v1/chat/completions", "/v1/fine_tuning/jobs"):
        response = client.post(path, content=body, headers=JSON)
        assert response.status_code == 400, response.text
        assert sorted(response.json()["error"]) == ["code", "message", "param", "type"]


def test_a_misspelt_field_is_answered_with_the_nearest_one(client: TestClient) -> None:
    message = expect(chat(client, temprature=1), 400, "temprature", "unknown_parameter")
    assert "Did you mean 'temperature'?" in message


def test_a_database_that_does_not_answer_is_503_and_shows_no_sql(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OperationalError("SELECT secret", {}, Exception("disk I/O error"))

    monkeypatch.setattr("models.registry.base_models.active", broken)
    response = client.get("/v1/models")
    message = expect(response, 503, None, "service_unavailable")
    assert "SELECT" not in message
    assert response.headers["retry-after"] == "5"


def test_a_value_that_the_database_refuses_is_400(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL takes no NUL, which a URL can hold; SQLite takes it."""

    def refuse(*_: object, **__: object) -> None:
        raise DataError("SELECT secret", {}, Exception("cannot contain NUL"))

    monkeypatch.setattr("models.registry.files.get", refuse)
    message = expect(client.get("/v1/files/a%00b"), 400, None, "invalid_value")
    assert "SELECT" not in message
