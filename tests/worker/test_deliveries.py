"""The outbox is emptied by whoever looks: sent, noted, and tried again after a failure."""

from pathlib import Path

from sqlalchemy import update

from models.db import Database, db_now
from models.registry import tenancy, webhooks
from models.registry.page import Cursor
from models.settings import DatabaseSettings, WebhookSettings
from models.tables import Base, WebhookDelivery
from models.webhook_sender import WebhookSender
from tests.webhook_receiver import LOCAL, receiving
from worker.deliveries import deliver_due

SENDER = WebhookSender(WebhookSettings(allowed_networks=[LOCAL]))


def test_a_refused_event_is_sent_again_under_the_same_id(tmp_path: Path) -> None:
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path / 'tunery.db'}"))
    Base.metadata.create_all(database.engine)
    with receiving() as receiver:
        receiver.answers = [503]
        with database.write() as session:
            project = tenancy.default_project(session)
            kinds = ["batch.completed"]
            endpoint = webhooks.create(session, project.id, "mine", receiver.url, kinds)
            webhooks.emit(session, project.id, "batch.completed", "batch_1")
        assert deliver_due(database, SENDER, 60) == 1
        assert deliver_due(database, SENDER, 60) == 0  # its next try is not due yet
        with database.write() as session:
            session.execute(update(WebhookDelivery).values(next_attempt_at=db_now()))
        assert deliver_due(database, SENDER, 60) == 1
    first, second = receiver.received
    assert first[0]["webhook-id"] == second[0]["webhook-id"]
    assert first[1] == second[1]
    with database.read() as session:
        [delivery] = webhooks.deliveries(session, endpoint.id, Cursor()).rows
    assert (delivery.status, delivery.attempts, delivery.last_error) == ("delivered", 2, None)
    database.close()
