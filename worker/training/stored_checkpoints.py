"""The checkpoints of a run in the object store: back to the local disk, and into the trainer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import ValidationError

from models.db import Database
from models.domain.reports import CheckpointManifest
from models.errors import UnprocessableError
from models.registry import checkpoints
from models.storage import MANIFEST, ObjectNotFoundError, ObjectStore, fetch_file
from models.tables import Checkpoint
from worker.adapter_format import fetch_adapter
from worker.training import checkpoint
from worker.training.loop import Trainer
from worker.training.publish import RunIdentity

log = structlog.get_logger(__name__)

_UNUSABLE = (ObjectNotFoundError, UnprocessableError, ValueError)


@dataclass(frozen=True, slots=True)
class StoredCheckpoints:
    """Where the checkpoints of `run` are; `scratch` is for local copies, `warn` takes sentences."""

    database: Database
    store: ObjectStore
    run: RunIdentity
    scratch: Path
    warn: Callable[[str], None]

    def restore_newest(self, trainer: Trainer) -> Path | None:
        """Restore the newest checkpoint that is complete and of this run; None if there is none."""
        for row in self._rows():
            try:
                directory = self._fetch(row)
                checkpoint.restore(trainer, directory)
            except _UNUSABLE as error:
                log.warning("checkpoint_unusable", step=row.step, error=str(error))
                self.warn(
                    f"The checkpoint of step {row.step} cannot be used ({error}); "
                    "an older one is tried."
                )
                continue
            return directory
        return None

    def restore_best(self, trainer: Trainer) -> Path | None:
        """Restore the checkpoint with the lowest loss on the whole validation split.

        Returns:
            Its directory; None if no checkpoint was judged, or the trainer stands at the best.

        Raises:
            ObjectNotFoundError, UnprocessableError, ValueError: it is damaged.
        """
        best = checkpoints.best(self._rows())
        if best is None or best.step == trainer.progress.step:
            return None
        last = trainer.progress.step
        directory = self._fetch(best)
        checkpoint.restore(trainer, directory)
        self.warn(
            f"The adapter is that of step {best.step}, which has the lowest validation loss "
            f"({float(best.metrics['full_valid_loss']):.4f}); training ended with step {last}."
        )
        return directory

    def _rows(self) -> list[Checkpoint]:
        with self.database.read() as session:
            return list(checkpoints.newest_first(session, self.run.job_id))

    def _fetch(self, row: Checkpoint) -> Path:
        """Fetch all files of a checkpoint; every sha256 is compared.

        Raises:
            ObjectNotFoundError: an object is missing.
            UnprocessableError: the adapter's manifest is inconsistent.
            ValueError: anything else does not fit.
        """
        try:
            manifest = CheckpointManifest.model_validate_json(
                self.store.get(f"{row.object_prefix}/{MANIFEST}")
            )
        except ValidationError as error:
            raise ValueError("its manifest is damaged") from error
        found = (manifest.job_id, manifest.step, manifest.spec_sha256, manifest.adapter_digest)
        if found != (self.run.job_id, row.step, self.run.spec_sha256, row.adapter_digest):
            raise ValueError("its manifest is of another run")
        directory = self.scratch / f"stored-{row.step}"
        fetch_adapter(self.store, row.adapter_digest, directory / "adapter")
        (directory / "state").mkdir(exist_ok=True)
        for file in manifest.files:
            path = directory / "state" / Path(file.name).name
            key = f"{row.object_prefix}/{file.name}"
            fetch_file(self.store, key, path, sha256=file.sha256)
        return directory
