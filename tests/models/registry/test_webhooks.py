"""The outbox: one row for each endpoint that wants an event, tried by one sender at a time."""

import json
from typing import Any

import pytest
from sqlalchemy import update

from models.db import Database, db_now
from models.domain.webhooks import RETRY_SECONDS
from models.errors import InvalidRequestError, NotFoundError
from models.registry import tenancy, webhooks
from models.registry.page import Cursor
from models.registry.webhooks import Due, Outcome
from models.tables import WebhookDelivery

URL = "https://example.com/hooks"


def add(database: Database, *event_types: str) -> tuple[str, str]:
    """Return the ids of the default project and of a new endpoint of it."""
    with database.write() as session:
        project = tenancy.default_project(session)
        endpoint = webhooks.create(session, project.id, "mine", URL, event_types)
        return project.id, endpoint.id


def emit(database: Database, project_id: str, kind: Any = "batch.completed") -> None:
    with database.write() as session:
        webhooks.emit(session, project_id, kind, "batch_1")


def claim(database: Database) -> list[Due]:
    with database.write() as session:
        return webhooks.claim_due(session, 60, 10)


def end(database: Database, due: Due, outcome: Outcome) -> bool:
    with database.write() as session:
        return webhooks.record(session, due, outcome)


def make_due(database: Database) -> None:
    with database.write() as session:
        session.execute(update(WebhookDelivery).values(next_attempt_at=db_now() - 1))


def only(database: Database, endpoint_id: str) -> WebhookDelivery:
    with database.read() as session:
        [delivery] = webhooks.deliveries(session, endpoint_id, Cursor()).rows
        return delivery


def test_an_event_goes_to_those_who_want_it_once(database: Database) -> None:
    project_id, endpoint_id = add(database, "batch.completed")
    _, other = add(database, "batch.failed")
    with database.write() as session:
        stranger = tenancy.create_project(session, "other").id
        webhooks.create(session, stranger, "theirs", URL, ["batch.completed"])
    emit(database, project_id)
    [due] = claim(database)
    assert claim(database) == []  # reserved
    body = json.loads(due.body)
    assert (body["id"], body["type"]) == (due.event_id, "batch.completed")
    assert body["data"] == {"id": "batch_1"}
    assert end(database, due, Outcome(204))
    assert not end(database, due, Outcome(204))
    delivery = only(database, endpoint_id)
    assert (delivery.status, delivery.attempts, delivery.last_status_code) == ("delivered", 1, 204)
    make_due(database)
    assert claim(database) == []
    with database.read() as session:
        assert webhooks.deliveries(session, other, Cursor()).rows == []


def test_a_failed_delivery_comes_later_and_later_and_then_no_more(database: Database) -> None:
    project_id, endpoint_id = add(database, "batch.completed")
    emit(database, project_id)
    for attempt, delay in enumerate(RETRY_SECONDS, 1):
        make_due(database)
        [due] = claim(database)
        assert due.attempt == attempt
        end(database, due, Outcome(500, "x" * 1000))
        with database.read() as session:
            wait = only(database, endpoint_id).next_attempt_at - webhooks.now(session)
        assert 0.85 * delay - 1 < wait < 1.15 * delay
    make_due(database)
    end(database, claim(database)[0], Outcome(error="refused"))
    delivery = only(database, endpoint_id)
    assert (delivery.status, delivery.last_error) == ("failed", "refused")
    with database.write() as session:
        webhooks.retry(session, endpoint_id, delivery.id)
    assert [due.attempt for due in claim(database)] == [1]


def test_gone_is_not_tried_again_and_a_late_sender_changes_nothing(database: Database) -> None:
    project_id, endpoint_id = add(database, "batch.completed")
    emit(database, project_id)
    [late] = claim(database)
    make_due(database)  # its lease ran out
    [due] = claim(database)
    assert not end(database, late, Outcome(204))
    assert end(database, due, Outcome(410, "gone"))
    assert only(database, endpoint_id).status == "failed"


def test_rotation_keeps_the_old_secret_only_when_asked(database: Database) -> None:
    project_id, endpoint_id = add(database, "batch.completed")
    for keep_old, n_secrets in ((True, 2), (False, 1)):
        with database.write() as session:
            endpoint = webhooks.get(session, project_id, endpoint_id)
            before = endpoint.secret
            endpoint = webhooks.rotate(session, endpoint, keep_old=keep_old)
            active = webhooks.active_secrets(endpoint, webhooks.now(session))
            assert len(active) == n_secrets
            assert active[0] != before
            later = webhooks.now(session) + webhooks.OLD_SECRET_SECONDS + 1
            assert webhooks.active_secrets(endpoint, later) == (endpoint.secret,)


def test_a_deleted_endpoint_takes_its_deliveries_along(database: Database) -> None:
    project_id, endpoint_id = add(database, "batch.completed")
    emit(database, project_id)
    with database.write() as session:
        webhooks.delete(session, project_id, endpoint_id)
    assert claim(database) == []
    with database.read() as session, pytest.raises(NotFoundError):
        webhooks.get(session, project_id, endpoint_id)


def test_a_project_has_so_many_endpoints_and_no_more(database: Database) -> None:
    for _ in range(webhooks.MAX_ENDPOINTS):
        add(database, "batch.completed")
    with pytest.raises(InvalidRequestError, match="Delete one"):
        add(database, "batch.completed")
