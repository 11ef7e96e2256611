"""Lints uploads: fetched to the disk, read by a limited child, results put into the store."""

import tempfile
from pathlib import Path

import structlog

from models.db import Database
from models.domain.reports import DataOptions, DatasetReport
from models.errors import LeaseLostError
from models.registry import files
from models.registry.files import LintedObjects
from models.settings import WorkerSettings
from models.storage import (
    ObjectNotFoundError,
    ObjectStore,
    dataset_prefix,
    fetch_file,
    put_file,
)
from models.tables import File, new_id
from worker.data.isolated import LintOrder, lint_in_child, refusal

log = structlog.get_logger(__name__)

LEASE_SECONDS = 60


class FileLinter:
    """Takes the oldest upload that nobody has linted, and lints it."""

    def __init__(self, database: Database, store: ObjectStore, settings: WorkerSettings) -> None:
        self._database = database
        self._store = store
        self._settings = settings

    def lint_next(self) -> bool:
        """Lint one file; return whether there was one."""
        with self._database.write() as session:
            file = files.claim_unvalidated(session, LEASE_SECONDS)
        if file is None:
            return False
        scratch = self._settings.scratch_dir
        scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch, prefix="lint-") as folder:
            try:
                self._lint(file, Path(folder))
            except LeaseLostError:
                log.info("lint_given_up", file_id=file.id)
        return True

    def _lint(self, file: File, folder: Path) -> None:
        options = DataOptions.model_validate(file.options or {})
        order = LintOrder(
            path=folder / "content",
            name=file.filename,
            shape=options.shape,
            columns=options.columns,
            normalised=folder / "rows.arrow",
            findings=folder / "findings.jsonl",
            cleaned=folder / "cleaned.jsonl",
            memory_bytes=self._settings.lint_memory_bytes,
            seconds=self._settings.lint_seconds,
        )
        try:
            fetch_file(self._store, file.object_key, order.path, sha256=file.sha256 or None)
        except ObjectNotFoundError:
            report = refusal(
                "content_missing",
                "the content of the file is gone from the object store.",
                "Upload it again.",
            )
        except ValueError as error:
            report = refusal("content_damaged", f"{error}", "Upload the file again.")
        else:
            report = lint_in_child(order, lambda: self._keep(file.id))
        self._record(file, report, order)

    def _keep(self, file_id: str) -> None:
        with self._database.write() as session:
            files.keep_claim(session, file_id, LEASE_SECONDS)

    def _record(self, file: File, report: DatasetReport, order: LintOrder) -> None:
        # Objects of a lint that comes too late must not replace those of the one that won.
        prefix = f"{dataset_prefix(file.id)}/{new_id('', 8)}"
        objects = LintedObjects(
            findings_key=self._put(order.findings, f"{prefix}/findings.jsonl"),
            rows_key=self._put(order.normalised, f"{prefix}/rows.arrow"),
            cleaned_key=self._put(order.cleaned, f"{prefix}/cleaned.jsonl"),
        )
        with self._database.write() as session:
            is_first = files.record_report(session, file.id, report, objects)
        if not is_first:
            for key in (objects.findings_key, objects.rows_key, objects.cleaned_key):
                if key is not None:
                    self._store.delete(key)
        log.info(
            "file_linted",
            file_id=file.id,
            rows=report.n_rows,
            errors=report.n_findings,
            warnings=report.n_warnings,
        )

    def _put(self, path: Path | None, key: str) -> str | None:
        if path is None or not path.exists() or path.stat().st_size == 0:
            return None
        put_file(self._store, key, path)
        return key
