"""The page's cookie: good for its key and its time alone."""

import time
from collections.abc import Callable

import pytest
from fastapi.testclient import TestClient

from api import page_session
from models.db import Database
from models.registry import tenancy
from models.tables import ApiKey


@pytest.fixture
def key(client: TestClient, database: Database) -> ApiKey:
    with database.read() as session:
        return tenancy.list_keys(session)[0]


def read(database: Database, cookie: str) -> page_session.PageSession | None:
    with database.read() as session:
        return page_session.read_cookie(session, cookie)


def test_a_cookie_stands_for_its_key(database: Database, key: ApiKey) -> None:
    found = read(database, page_session.make_cookie(key))
    assert found is not None
    assert found.key.id == key.id


CHANGES: list[Callable[[str], str]] = [
    lambda cookie: "",
    lambda cookie: cookie[:-1] + ("A" if cookie[-1] != "A" else "B"),
    lambda cookie: cookie.replace("key_", "key-"),
    lambda cookie: ".".join([cookie.split(".")[0], "99999999999", cookie.split(".")[2]]),
    lambda cookie: cookie.rpartition(".")[0] + ".",
    lambda cookie: "..",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_cookie_that_was_changed_is_nobodys(
    database: Database, key: ApiKey, change: Callable[[str], str]
) -> None:
    assert read(database, change(page_session.make_cookie(key))) is None


def test_a_cookie_ends_with_its_time_and_with_its_key(database: Database, key: ApiKey) -> None:
    old = page_session.make_cookie(key, time.time() - page_session.SECONDS - 1)
    assert read(database, old) is None
    cookie = page_session.make_cookie(key)
    with database.write() as session:
        tenancy.revoke_key(session, key.id)
    assert read(database, cookie) is None


def test_a_cookie_reads_at_once_and_changes_only_with_the_token(
    client: TestClient, database: Database, key: ApiKey
) -> None:
    del client.headers["authorization"]
    cookie = page_session.make_cookie(key)
    found = read(database, cookie)
    assert found is not None
    client.cookies.set(page_session.COOKIE, cookie)
    assert client.get("/v1/models").status_code == 200
    body = {"shape": ""}
    path = "/v1/files/file-x/lint"
    assert client.post(path, json=body).status_code == 403
    token = {page_session.CSRF_HEADER: found.csrf}
    assert client.post(path, json=body, headers=token).status_code == 404
    elsewhere = token | {"sec-fetch-site": "cross-site"}
    assert client.post(path, json=body, headers=elsewhere).status_code == 403
