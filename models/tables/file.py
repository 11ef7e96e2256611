"""Uploaded and produced files, and uploads that come in parts."""

from sqlalchemy import BigInteger, ForeignKey, Index
from sqlalchemy.orm import Mapped, mapped_column

from models.domain.base import JsonObject
from models.domain.status import FileStatus, UploadStatus
from models.tables.base import Base, Created, Listed


class File(Listed, Base):
    """Bytes in the object store under `object_key`, which files of the same content share.

    Of a data set, `report` is a dumped ``DatasetReport``, `options` how its owner wants it read
    (a dumped ``DataOptions``), and the other keys are what the lint made of it: all findings, the
    usable rows, and, where rows are at fault, the usable rows as they were given.
    """

    __tablename__ = "files"
    __table_args__ = (
        Index("ix_files_content", "project_id", "sha256"),
        Index("ix_files_list", "project_id", "created_at", "id"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    object_key: Mapped[str] = mapped_column(index=True)
    status: Mapped[str] = mapped_column(default=FileStatus.UPLOADED, index=True)
    status_details: Mapped[str | None]
    options: Mapped[JsonObject | None]
    report: Mapped[JsonObject | None]
    findings_key: Mapped[str | None]
    rows_key: Mapped[str | None]
    cleaned_key: Mapped[str | None]
    data_sha256: Mapped[str | None]
    lease_until: Mapped[float | None]


class Upload(Created, Base):
    """A file that comes in parts; `file_id` is set when it is complete."""

    __tablename__ = "uploads"

    id: Mapped[str] = mapped_column(primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), index=True)
    purpose: Mapped[str]
    filename: Mapped[str]
    mime_type: Mapped[str]
    bytes: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(default=UploadStatus.PENDING, index=True)
    expires_at: Mapped[float]
    file_id: Mapped[str | None]


class UploadPart(Created, Base):
    """One part of an upload: an object of its own until the upload is complete."""

    __tablename__ = "upload_parts"

    id: Mapped[str] = mapped_column(primary_key=True)
    upload_id: Mapped[str] = mapped_column(ForeignKey("uploads.id"), index=True)
    bytes: Mapped[int] = mapped_column(BigInteger)
