"""The sending half of webhooks: takes from the outbox what is due, and notes what became of it."""

import asyncio

import structlog

from models.db import Database
from models.registry import webhooks
from models.registry.webhooks import Due, Outcome
from models.webhook_sender import WebhookSender

log = structlog.get_logger(__name__)

AT_A_TIME = 16


def deliver_due(database: Database, sender: WebhookSender, lease_seconds: float) -> int:
    """Try every delivery that is due, `AT_A_TIME` at once; return how many were tried.

    Args:
        database: Where the outbox is.
        sender: How they are sent.
        lease_seconds: For how long no other worker tries them.
    """
    with database.write() as session:
        due = webhooks.claim_due(session, lease_seconds, AT_A_TIME)
    if due:
        outcomes = asyncio.run(_send_all(sender, due))
        with database.write() as session:
            for delivery, outcome in zip(due, outcomes, strict=True):
                webhooks.record(session, delivery, outcome)
                log.info(
                    "webhook_sent" if outcome.is_delivered else "webhook_not_sent",
                    delivery_id=delivery.delivery_id,
                    attempt=delivery.attempt,
                    status=outcome.status_code,
                    error=outcome.error,
                )
    return len(due)


async def _send_all(sender: WebhookSender, due: list[Due]) -> list[Outcome]:
    return await asyncio.gather(
        *(sender.send(each.url, each.event_id, each.body, each.secrets) for each in due)
    )
