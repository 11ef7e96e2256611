"""Inference servers that are alive."""

from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base, Created


class InferenceServer(Created, Base):
    """One process holding one base model on one device; gone when its lease runs out."""

    __tablename__ = "inference_servers"

    id: Mapped[str] = mapped_column(primary_key=True)
    base_model: Mapped[str] = mapped_column(index=True)
    base_fingerprint: Mapped[str]
    precision: Mapped[str]
    url: Mapped[str]
    lease_until: Mapped[float]
