"""``/v1/webhook_endpoints``: where a project's events are sent, signed as the SDK verifies."""

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import Field, StrictBool
from starlette.concurrency import run_in_threadpool

from api import bodies
from api.deps import After, Caller, CallerDep, ReadSession, ServicesDep, WriteSession
from api.services import Services
from api.strict_json import StrictJsonRoute
from models.domain.base import JsonObject, Parameters, Text
from models.domain.webhooks import EVENT_TYPES, WebhookEventType
from models.errors import UnprocessableError
from models.registry import webhooks
from models.registry.page import Cursor
from models.tables import WebhookDelivery, WebhookEndpoint, new_id
from models.webhook_sender import WebhookSender

router = APIRouter(tags=["webhooks"], route_class=StrictJsonRoute)

HINT_CHARACTERS = 4

Name = Annotated[Text, Field(min_length=1, max_length=200)]
EventTypes = Annotated[list[WebhookEventType], Field(min_length=1, max_length=len(EVENT_TYPES))]
Limit = Annotated[int, Query(ge=1, le=100)]


class WebhookCreate(Parameters):
    """The body of ``POST /webhook_endpoints``."""

    name: Name
    url: Text
    event_types: EventTypes


class WebhookUpdate(Parameters):
    """The body of ``POST /webhook_endpoints/{id}``: what is left out stays."""

    name: Name | None = None
    url: Text | None = None
    event_types: EventTypes | None = None


class SecretRotation(Parameters):
    """The body of ``POST /webhook_endpoints/{id}/rotate_secret``."""

    keep_old_secret_active_for_24_hours: StrictBool | None = None


class WebhookTest(Parameters):
    """The body of ``POST /webhook_endpoints/{id}/test``."""

    event_type: WebhookEventType


def _endpoint_body(endpoint: WebhookEndpoint) -> JsonObject:
    return {
        "id": endpoint.id,
        "object": "webhook_endpoint",
        "name": endpoint.name,
        "url": endpoint.url,
        "event_types": endpoint.event_types,
        "created_at": int(endpoint.created_at),
        "updated_at": int(endpoint.updated_at),
        "signing_secret_hint": f"whsec_…{endpoint.secret[-HINT_CHARACTERS:]}",
    }


def _delivery_body(delivery: WebhookDelivery) -> JsonObject:
    waits = delivery.status == "pending"
    return {
        "id": delivery.id,
        "object": "webhook_endpoint.delivery",
        "webhook_endpoint_id": delivery.endpoint_id,
        "event_id": delivery.event_id,
        "event_type": delivery.event_type,
        "created_at": int(delivery.created_at),
        "status": delivery.status,
        "attempts": delivery.attempts,
        "next_attempt_at": int(delivery.next_attempt_at) if waits else None,
        "last_status_code": delivery.last_status_code,
        "last_error": delivery.last_error,
        "delivered_at": None if delivery.delivered_at is None else int(delivery.delivered_at),
    }


@router.get("/webhook_event_types")
def list_event_types() -> JsonObject:
    return {"object": "list", "data": list(EVENT_TYPES)}


@router.post("/webhook_endpoints")
def create_endpoint(
    body: WebhookCreate, session: WriteSession, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Have events sent to a URL; the secret that signs them is in this answer and never again."""
    WebhookSender(services.settings.webhooks).check_url(body.url)
    endpoint = webhooks.create(session, caller.project_id, body.name, body.url, body.event_types)
    return _endpoint_body(endpoint) | {"signing_secret": endpoint.secret}


@router.get("/webhook_endpoints")
def list_endpoints(
    session: ReadSession, caller: CallerDep, after: After = None, limit: Limit = 20
) -> JsonObject:
    page = webhooks.list_page(session, caller.project_id, Cursor(after, limit))
    return bodies.list_body(page, _endpoint_body)


@router.get("/webhook_endpoints/{webhook_endpoint_id}")
def retrieve_endpoint(
    webhook_endpoint_id: str, session: ReadSession, caller: CallerDep
) -> JsonObject:
    return _endpoint_body(webhooks.get(session, caller.project_id, webhook_endpoint_id))


@router.post("/webhook_endpoints/{webhook_endpoint_id}")
def update_endpoint(
    webhook_endpoint_id: str,
    body: WebhookUpdate,
    session: WriteSession,
    services: ServicesDep,
    caller: CallerDep,
) -> JsonObject:
    """Change what is given; the rest stays."""
    if body.url is not None:
        WebhookSender(services.settings.webhooks).check_url(body.url)
    endpoint = webhooks.get(session, caller.project_id, webhook_endpoint_id)
    return _endpoint_body(webhooks.change(session, endpoint, **body.model_dump(exclude_none=True)))


@router.delete("/webhook_endpoints/{webhook_endpoint_id}")
def delete_endpoint(
    webhook_endpoint_id: str, session: WriteSession, caller: CallerDep
) -> JsonObject:
    webhooks.delete(session, caller.project_id, webhook_endpoint_id)
    return {"id": webhook_endpoint_id, "object": "webhook_endpoint.deleted", "deleted": True}


@router.post("/webhook_endpoints/{webhook_endpoint_id}/rotate_secret")
def rotate_secret(
    webhook_endpoint_id: str,
    session: WriteSession,
    caller: CallerDep,
    body: SecretRotation | None = None,
) -> JsonObject:
    """Make a new secret; for a day the old one signs too if that is asked for."""
    endpoint = webhooks.get(session, caller.project_id, webhook_endpoint_id)
    keep_old = bool(body and body.keep_old_secret_active_for_24_hours)
    endpoint = webhooks.rotate(session, endpoint, keep_old=keep_old)
    return _endpoint_body(endpoint) | {"signing_secret": endpoint.secret}


@router.post("/webhook_endpoints/{webhook_endpoint_id}/test")
async def test_endpoint(
    webhook_endpoint_id: str, body: WebhookTest, services: ServicesDep, caller: CallerDep
) -> JsonObject:
    """Send an event about an object that does not exist, now, and say what the endpoint answers."""
    url, secrets, now = await run_in_threadpool(_target, services, caller, webhook_endpoint_id)
    event_id = new_id("evt_")
    event = webhooks.event_body(event_id, body.event_type, "test", now)
    sender = WebhookSender(services.settings.webhooks)
    outcome = await sender.send(url, event_id, event, secrets)
    if outcome.status_code is None:
        raise UnprocessableError(
            f"The event could not be sent to {url}. {outcome.error}",
            param="url",
            code="webhook_not_delivered",
        )
    return {
        "object": "webhook_endpoint.test",
        "webhook_endpoint_id": webhook_endpoint_id,
        "event_type": body.event_type,
        "status_code": outcome.status_code,
        "success": True,
    }


def _target(
    services: Services, caller: Caller, endpoint_id: str
) -> tuple[str, tuple[str, ...], float]:
    with services.database.read() as session:
        endpoint = webhooks.get(session, caller.project_id, endpoint_id)
        now = webhooks.now(session)
        return endpoint.url, webhooks.active_secrets(endpoint, now), now


@router.get("/webhook_endpoints/{webhook_endpoint_id}/deliveries")
def list_deliveries(
    webhook_endpoint_id: str,
    session: ReadSession,
    caller: CallerDep,
    after: After = None,
    limit: Limit = 20,
) -> JsonObject:
    """What was sent to an endpoint or waits for its next try, newest first."""
    webhooks.get(session, caller.project_id, webhook_endpoint_id)
    page = webhooks.deliveries(session, webhook_endpoint_id, Cursor(after, limit))
    return bodies.list_body(page, _delivery_body)


@router.post("/webhook_endpoints/{webhook_endpoint_id}/deliveries/{delivery_id}/retry")
def retry_delivery(
    webhook_endpoint_id: str, delivery_id: str, session: WriteSession, caller: CallerDep
) -> JsonObject:
    """Send an event once more, at once."""
    webhooks.get(session, caller.project_id, webhook_endpoint_id)
    return _delivery_body(webhooks.retry(session, webhook_endpoint_id, delivery_id))
