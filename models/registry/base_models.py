"""Base models: the operator's catalog as rows, and the identity that a worker found."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from sqlalchemy import bindparam, select, update
from sqlalchemy.orm import Session

from models.domain.estimates import BaseShape
from models.errors import InvalidRequestError
from models.prepared import PreparedRows
from models.tables import BaseModel

_by_name = PreparedRows(BaseModel, select(BaseModel).where(BaseModel.name == bindparam("name")))


class Identity(Protocol):
    """The part of ``worker.base_models.BaseModelInfo`` that a row keeps."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def config_sha256(self) -> str: ...

    @property
    def weights_sha256(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def n_parameters(self) -> int: ...

    @property
    def max_length(self) -> int: ...

    @property
    def shape(self) -> BaseShape | None: ...


def sync_catalog(session: Session, catalog: Mapping[str, str]) -> None:
    """Make the rows equal the catalog; names that left it are retired, never deleted."""
    rows = {row.name: row for row in session.scalars(select(BaseModel).with_for_update())}
    for name, source in catalog.items():
        row = rows.get(name)
        if row is None:
            session.add(BaseModel(name=name, source=source))
        elif row.source != source or row.retired:
            row.source, row.retired = source, False
    for name, row in rows.items():
        if name not in catalog:
            row.retired = True
    session.flush()


def active(session: Session) -> Sequence[BaseModel]:
    return session.scalars(
        select(BaseModel).where(BaseModel.retired.is_(False)).order_by(BaseModel.name)
    ).all()


def get(session: Session, name: str) -> BaseModel:
    """Return an active base model, only to be read.

    Raises:
        InvalidRequestError: there is none; it lists the names there are.
    """
    found = _by_name.all(session, name=name)
    if not found or found[0].retired:
        known = ", ".join(model.name for model in active(session)) or "none"
        raise InvalidRequestError(
            f"Model {name!r} is not available for fine-tuning. Base models here: {known}.",
            param="model",
            code="model_not_found",
        )
    return found[0]


def record_identity(session: Session, info: Identity) -> None:
    """Store what a process found when it materialised the base model."""
    session.execute(
        update(BaseModel)
        .where(BaseModel.name == info.name)
        .values(
            fingerprint=info.fingerprint,
            config_sha256=info.config_sha256,
            weights_sha256=info.weights_sha256,
            vocab_size=info.vocab_size,
            n_parameters=info.n_parameters,
            max_length=info.max_length,
            shape=info.shape and info.shape.model_dump(mode="json"),
        )
    )
