"""Webhook endpoints, and the outbox: events written with what they tell of, sent afterwards."""

import base64
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import CursorResult, func, select, update
from sqlalchemy import delete as sql_delete
from sqlalchemy.orm import Session

from models.db import db_now
from models.domain.status import DeliveryStatus
from models.domain.webhooks import WebhookEventType, retry_delay
from models.errors import InvalidRequestError, NotFoundError
from models.registry.page import Cursor, Page, page
from models.tables import WebhookDelivery, WebhookEndpoint, new_id

MAX_ENDPOINTS = 32
OLD_SECRET_SECONDS = 24 * 3600
MAX_ERROR = 300
JITTER = 0.1


def new_secret() -> str:
    """Return ``whsec_`` and 32 random bytes in base64, the form of Standard Webhooks."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def create(
    session: Session, project_id: str, name: str, url: str, event_types: Sequence[str]
) -> WebhookEndpoint:
    """Add an endpoint with a new secret.

    Raises:
        InvalidRequestError: the project has `MAX_ENDPOINTS` already.
    """
    n_endpoints = session.scalar(
        select(func.count())
        .select_from(WebhookEndpoint)
        .where(WebhookEndpoint.project_id == project_id)
    )
    if (n_endpoints or 0) >= MAX_ENDPOINTS:
        raise InvalidRequestError(
            f"This project has {MAX_ENDPOINTS} webhook endpoints, which is the most. Delete one.",
            code="too_many_webhook_endpoints",
        )
    moment = now(session)
    endpoint = WebhookEndpoint(
        id=new_id("we_"),
        project_id=project_id,
        name=name,
        url=url,
        event_types=list(dict.fromkeys(event_types)),
        secret=new_secret(),
        created_at=moment,
        updated_at=moment,
    )
    session.add(endpoint)
    session.flush()
    return endpoint


def get(session: Session, project_id: str, endpoint_id: str) -> WebhookEndpoint:
    """Return an endpoint of this project, or raise `NotFoundError`."""
    endpoint = session.scalar(
        select(WebhookEndpoint).where(
            WebhookEndpoint.id == endpoint_id, WebhookEndpoint.project_id == project_id
        )
    )
    if endpoint is None:
        raise NotFoundError(
            f"No such webhook endpoint: {endpoint_id!r}.",
            param="webhook_endpoint_id",
            code="webhook_endpoint_not_found",
        )
    return endpoint


def list_page(session: Session, project_id: str, cursor: Cursor) -> Page[WebhookEndpoint]:
    query = select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    keys = (WebhookEndpoint.created_at, WebhookEndpoint.id)
    return page(session, query, WebhookEndpoint, keys, cursor)


def change(session: Session, endpoint: WebhookEndpoint, **values: object) -> WebhookEndpoint:
    """Write `values` to an endpoint; what is not given stays."""
    if values:
        session.execute(
            update(WebhookEndpoint)
            .where(WebhookEndpoint.id == endpoint.id)
            .values(updated_at=db_now(), **values)
        )
        session.refresh(endpoint)
    return endpoint


def rotate(session: Session, endpoint: WebhookEndpoint, *, keep_old: bool) -> WebhookEndpoint:
    """Give an endpoint a new secret; the old one signs too for a day if `keep_old`."""
    return change(
        session,
        endpoint,
        secret=new_secret(),
        old_secret=endpoint.secret if keep_old else None,
        old_secret_until=db_now() + OLD_SECRET_SECONDS if keep_old else None,
    )


def delete(session: Session, project_id: str, endpoint_id: str) -> None:
    """Remove an endpoint and what has not been sent to it yet."""
    endpoint = get(session, project_id, endpoint_id)
    session.execute(sql_delete(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint.id))
    session.execute(sql_delete(WebhookEndpoint).where(WebhookEndpoint.id == endpoint.id))


def event_body(event_id: str, event_type: str, object_id: str, created_at: float) -> str:
    """Return the text of an event as OpenAI sends it: an object with only the id of its subject."""
    return json.dumps(
        {
            "id": event_id,
            "object": "event",
            "created_at": int(created_at),
            "type": event_type,
            "data": {"id": object_id},
        }
    )


def emit(session: Session, project_id: str, event_type: WebhookEventType, object_id: str) -> None:
    """Put an event into the outbox of every endpoint of a project that wants it."""
    endpoints = session.scalars(
        select(WebhookEndpoint).where(WebhookEndpoint.project_id == project_id)
    ).all()
    wanting = [endpoint for endpoint in endpoints if event_type in endpoint.event_types]
    if not wanting:
        return
    event_id = new_id("evt_")
    moment = now(session)
    body = event_body(event_id, event_type, object_id, moment)
    session.add_all(
        WebhookDelivery(
            id=new_id("whd_"),
            endpoint_id=endpoint.id,
            event_id=event_id,
            event_type=event_type,
            body=body,
            next_attempt_at=moment,
        )
        for endpoint in wanting
    )
    session.flush()


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery that is to be tried now, and where it goes."""

    delivery_id: str
    attempt: int
    event_id: str
    body: str
    url: str
    secrets: tuple[str, ...]


def claim_due(session: Session, lease_seconds: float, limit: int) -> list[Due]:
    """Reserve deliveries whose time has come for `lease_seconds`, oldest first.

    A sender that dies leaves them to the next one after that time; their attempt counts.
    """
    rows = session.execute(
        select(WebhookDelivery, WebhookEndpoint)
        .join(WebhookEndpoint, WebhookDelivery.endpoint_id == WebhookEndpoint.id)
        .where(
            WebhookDelivery.status == DeliveryStatus.PENDING,
            WebhookDelivery.next_attempt_at <= db_now(),
        )
        .order_by(WebhookDelivery.next_attempt_at)
        .limit(limit)
        .with_for_update(skip_locked=True, of=WebhookDelivery)
    ).all()
    moment = now(session)
    claimed = []
    for delivery, endpoint in rows:
        delivery.attempts += 1
        delivery.next_attempt_at = moment + lease_seconds
        claimed.append(
            Due(
                delivery.id,
                delivery.attempts,
                delivery.event_id,
                delivery.body,
                endpoint.url,
                active_secrets(endpoint, moment),
            )
        )
    session.flush()
    return claimed


def active_secrets(endpoint: WebhookEndpoint, moment: float) -> tuple[str, ...]:
    """Return the secrets that sign at this time, the newest first."""
    if endpoint.old_secret is not None and (endpoint.old_secret_until or 0) > moment:
        return endpoint.secret, endpoint.old_secret
    return (endpoint.secret,)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt: the status of the answer, or why there was none."""

    status_code: int | None = None
    error: str | None = None

    @property
    def is_delivered(self) -> bool:
        return self.status_code is not None and 200 <= self.status_code < 300

    @property
    def is_final(self) -> bool:
        """Whether another attempt is pointless: 410 says that nobody listens there any more."""
        return self.is_delivered or self.status_code == 410


def record(session: Session, due: Due, outcome: Outcome) -> bool:
    """Note how an attempt ended; say whether it was still the newest one.

    After a failure the next try comes later and later (`RETRY_SECONDS`, with a little chance so
    that many do not come together), and at last none.
    """
    delay = None if outcome.is_final else retry_delay(due.attempt)
    status = DeliveryStatus.PENDING
    if outcome.is_delivered:
        status = DeliveryStatus.DELIVERED
    elif delay is None:
        status = DeliveryStatus.FAILED
    values: dict[str, object] = {
        "status": status,
        "last_status_code": outcome.status_code,
        "last_error": outcome.error and outcome.error[:MAX_ERROR],
    }
    if outcome.is_delivered:
        values["delivered_at"] = db_now()
    if delay is not None:
        values["next_attempt_at"] = db_now() + delay * random.uniform(1 - JITTER, 1 + JITTER)
    result = session.execute(
        update(WebhookDelivery)
        .where(
            WebhookDelivery.id == due.delivery_id,
            WebhookDelivery.attempts == due.attempt,
            WebhookDelivery.status == DeliveryStatus.PENDING,
        )
        .values(**values)
    )
    assert isinstance(result, CursorResult)
    return result.rowcount == 1


def deliveries(session: Session, endpoint_id: str, cursor: Cursor) -> Page[WebhookDelivery]:
    """Return what was sent to an endpoint or waits for it, newest first."""
    query = select(WebhookDelivery).where(WebhookDelivery.endpoint_id == endpoint_id)
    keys = (WebhookDelivery.created_at, WebhookDelivery.id)
    return page(session, query, WebhookDelivery, keys, cursor)


def retry(session: Session, endpoint_id: str, delivery_id: str) -> WebhookDelivery:
    """Have a delivery sent again at once, with a new series of attempts.

    Raises:
        NotFoundError: the endpoint has no such delivery.
    """
    delivery = session.scalar(
        select(WebhookDelivery).where(
            WebhookDelivery.id == delivery_id, WebhookDelivery.endpoint_id == endpoint_id
        )
    )
    if delivery is None:
        raise NotFoundError(
            f"No such delivery: {delivery_id!r}.",
            param="delivery_id",
            code="webhook_delivery_not_found",
        )
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.id == delivery.id)
        .values(
            status=DeliveryStatus.PENDING,
            attempts=0,
            next_attempt_at=db_now(),
            delivered_at=None,
        )
    )
    session.refresh(delivery)
    return delivery


def now(session: Session) -> float:
    """Return the time by the database's clock."""
    return session.scalar(select(db_now())) or 0.0
