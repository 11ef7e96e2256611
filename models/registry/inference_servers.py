"""Inference servers: they announce themselves, and are forgotten when they stop doing so."""

from dataclasses import dataclass

from sqlalchemy import delete as sql_delete
from sqlalchemy import select
from sqlalchemy.orm import Session

from models.db import db_now
from models.errors import UnavailableError
from models.tables import InferenceServer


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a server says of itself: the base model it holds, how, and where it is reached."""

    server_id: str
    base_model: str
    base_fingerprint: str
    precision: str
    url: str


def announce(session: Session, server: Announcement, ttl_seconds: float) -> None:
    """Say that a server is ready, for `ttl_seconds`; also clears away those whose time is over."""
    session.execute(sql_delete(InferenceServer).where(InferenceServer.lease_until < db_now()))
    session.merge(
        InferenceServer(
            id=server.server_id,
            base_model=server.base_model,
            base_fingerprint=server.base_fingerprint,
            precision=server.precision,
            url=server.url,
            lease_until=(session.scalar(select(db_now())) or 0.0) + ttl_seconds,
        )
    )


def withdraw(session: Session, server_id: str) -> None:
    session.execute(sql_delete(InferenceServer).where(InferenceServer.id == server_id))


def forget_all(session: Session) -> None:
    """Remove every server: for a supervisor that knows that none of them runs any more."""
    session.execute(sql_delete(InferenceServer))


def for_base(session: Session, base_model: str) -> InferenceServer:
    """Return the live server of a base model that announced itself last.

    Raises:
        UnavailableError: there is none right now.
    """
    server = session.scalar(
        select(InferenceServer)
        .where(InferenceServer.base_model == base_model, InferenceServer.lease_until >= db_now())
        .order_by(InferenceServer.lease_until.desc())
        .limit(1)
    )
    if server is None:
        raise UnavailableError(
            f"No inference server holds base model {base_model!r} at the moment. Start one with "
            "'tunery inference', or wait if the service is just starting.",
            param="model",
            code="no_inference_server",
            retry_after=5,
        )
    return server
