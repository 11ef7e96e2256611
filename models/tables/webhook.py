"""Webhook endpoints, and the outbox of what is sent to them."""

from sqlalchemy import ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.status import DeliveryStatus
from models.tables.base import Base, Created


class WebhookEndpoint(Created, Base):
    """Where a project wants its events sent; `secret` signs them (``whsec_…``).

    After a rotation `old_secret` signs too, until `old_secret_until`.
    """

    __tablename__ = "webhook_endpoints"
    __table_args__ = (Index("ix_webhook_endpoints_list", "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str]
    url: Mapped[str]
    event_types: Mapped[list[str]]
    secret: Mapped[str]
    old_secret: Mapped[str | None]
    old_secret_until: Mapped[float | None]
    updated_at: Mapped[float]


class WebhookDelivery(Created, Base):
    """One event for one endpoint: written with what it tells of, sent afterwards until it is taken.

    `event_id` is the same for all endpoints, so that a receiver can drop what comes twice. `body`
    is the text that is signed and sent.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        Index("ix_webhook_deliveries_due", "status", "next_attempt_at"),
        Index("ix_webhook_deliveries_list", "endpoint_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    endpoint_id: Mapped[str] = mapped_column(ForeignKey("webhook_endpoints.id"))
    event_id: Mapped[str]
    event_type: Mapped[str]
    body: Mapped[str]
    status: Mapped[str] = mapped_column(default=DeliveryStatus.PENDING)
    attempts: Mapped[int] = mapped_column(default=0)
    next_attempt_at: Mapped[float]
    last_status_code: Mapped[int | None]
    last_error: Mapped[str | None]
    delivered_at: Mapped[float | None]
