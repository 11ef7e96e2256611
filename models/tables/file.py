"""Uploaded and produced files."""

from sqlalchemy import BigInteger, ForeignKey
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.domain.status import FileStatus
from models.tables.base import Base, Created


class File(Created, Base):
    """Bytes in the object store under ``files/{id}``; `report` is a dumped ``DatasetReport``."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    status: Mapped[str] = mapped_column(default=FileStatus.UPLOADED, index=True)
    status_details: Mapped[str | None]
    report: Mapped[JsonObject | None]
    lease_until: Mapped[float | None]
