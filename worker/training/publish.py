"""From local files to objects and rows: checkpoints, their retention, the final adapter.

The order is the whole point: objects first, a manifest with checksums after them, one fenced
transaction last. A crash in between leaves objects that no row names, and a job that another
attempt resumes.
"""

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from sqlalchemy import select
from sqlalchemy.orm import Session

from models.db import Database
from models.domain.reports import AdapterManifest, CheckpointManifest, ManifestFile, StepMetrics
from models.domain.status import FileStatus
from models.domain.training import TrainingSpec
from models.errors import TrainingFailedError
from models.registry import adapters, checkpoints, files, job_runs, metrics
from models.storage import (
    MANIFEST,
    ObjectStore,
    adapter_prefix,
    checkpoint_prefix,
    put_file,
    sha256_file,
    upload_key,
)
from models.tables import Adapter, BaseModel, Checkpoint, File, new_id
from worker.adapter_format import ADAPTER_FILES, digest_of, fetch_adapter, put_adapter
from worker.base_models import BaseModelInfo
from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.errors import AdapterFormatError
from worker.training import methods
from worker.training.checkpoint import (
    ADAPTER_TENSORS,
    STATE_FILES,
    library_versions,
    published_tensors,
)
from worker.training.loop import Trainer
from worker.training.methods.base import Served
from worker.training.model import gives_same_logits, module_shapes
from worker.training.task import Progress

KEPT_CHECKPOINTS = 2
RESULTS_PURPOSE, RESULTS_NAME = "fine-tune-results", "step_metrics.csv"
_OPENAI_COLUMNS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_accuracy": "train_mean_token_accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_mean_token_accuracy",
}
_OWN_COLUMNS = [name for name in StepMetrics.model_fields if name not in _OPENAI_COLUMNS.values()]


@dataclass(frozen=True, slots=True)
class RunIdentity:
    """What a run is of; goes into every manifest. `spec` is resolved."""

    job_id: str
    attempt: int
    project_id: str
    organization: str
    spec: TrainingSpec
    data_sha256: str
    base: BaseModelInfo
    template_sha256: str
    chat_template: str
    tokenizer_sha256: str

    @property
    def spec_sha256(self) -> str:
        return hashlib.sha256(self.spec.model_dump_json().encode()).hexdigest()


class Publisher:
    """Publishes what one run makes. Every method raises `LeaseLostError` for an old attempt."""

    def __init__(self, database: Database, store: ObjectStore, run: RunIdentity) -> None:
        self._database = database
        self._store = store
        self._run = run

    def checkpoint(self, directory: Path, point: StepMetrics) -> None:
        """Publish the state in `directory` (see ``checkpoint.save``), then retire older ones."""
        run, step = self._run, point.step
        manifest = self._adapter_manifest(directory / "adapter", step)
        put_adapter(self._store, directory / "adapter", manifest)
        prefix = checkpoint_prefix(run.job_id, step, run.attempt)
        state = []
        for name in STATE_FILES:
            path = directory / "state" / name
            put_file(self._store, f"{prefix}/{name}", path)
            state.append(
                ManifestFile(name=name, bytes=path.stat().st_size, sha256=sha256_file(path))
            )
        complete = CheckpointManifest(
            job_id=run.job_id,
            attempt=run.attempt,
            step=step,
            adapter_digest=manifest.digest,
            spec_sha256=run.spec_sha256,
            files=state,
            versions=library_versions(),
        )
        self._store.put(f"{prefix}/{MANIFEST}", complete.model_dump_json(indent=2).encode())
        name = adapters.new_name(run.base.name, run.organization, run.spec.suffix)
        with self._database.write() as session:
            job_runs.fence(session, run.job_id, run.attempt)
            self._secure_content(session, directory / "adapter", manifest)
            checkpoints.record(
                session,
                Checkpoint(
                    id=new_id("ftckpt_"),
                    job_id=run.job_id,
                    attempt=run.attempt,
                    step=step,
                    name=f"{name}:ckpt-step-{step}",
                    object_prefix=prefix,
                    adapter_digest=manifest.digest,
                    base_fingerprint=run.base.fingerprint,
                    metrics=point.model_dump(exclude_none=True),
                ),
            )
        self._retire_checkpoints()

    def adapter(self, trainer: Trainer, directory: Path, scratch: Path, last: Progress) -> str:
        """Publish the adapter in `directory`/adapter as the job's result and end the job well.

        What the store holds is read back first: it must be the trained weights, bit for bit, and
        give the trainer's logits.

        Args:
            trainer: In the state that is published.
            directory: Its files.
            scratch: A directory that does not exist yet.
            last: How far training came, which may be further.

        Returns:
            The ``ft:…`` name.

        Raises:
            TrainingFailedError: it cannot be read back, or is not what was trained
                (``adapter_not_servable``).
        """
        run = self._run
        manifest = self._adapter_manifest(directory / "adapter", trainer.progress.step)
        put_adapter(self._store, directory / "adapter", manifest)
        self._verify(trainer, manifest, scratch)
        results = self._put_results(last.step)
        name = adapters.new_name(run.base.name, run.organization, run.spec.suffix)
        with self._database.write() as session:
            job_runs.fence(session, run.job_id, run.attempt)
            self._secure_content(session, directory / "adapter", manifest)
            files.create(session, results)
            adapters.publish(
                session,
                Adapter(
                    name=name,
                    project_id=run.project_id,
                    job_id=run.job_id,
                    base_model=run.base.name,
                    digest=manifest.digest,
                    bytes=sum(file.bytes for file in manifest.files),
                    manifest=manifest.model_dump(mode="json"),
                ),
            )
            job_runs.succeed(
                session,
                run.job_id,
                run.attempt,
                fine_tuned_model=name,
                trained_tokens=last.n_tokens,
                result_file=results.id,
            )
        return name

    def _adapter_manifest(self, directory: Path, step: int) -> AdapterManifest:
        run = self._run
        digest, listed = digest_of(directory)
        return AdapterManifest(
            digest=digest,
            files=listed,
            base_model=run.base.name,
            base_fingerprint=run.base.fingerprint,
            vocab_size=run.base.vocab_size,
            template_sha256=run.template_sha256,
            chat_template=run.chat_template,
            tokenizer_sha256=run.tokenizer_sha256,
            method=run.spec.peft["type"],
            served=methods.served(run.spec.peft).value,
            objective=run.spec.objective["type"],
            objective_params=run.spec.objective,
            precision=run.spec.precision.model_dump(mode="json"),
            step=step,
            spec_sha256=run.spec_sha256,
            data_sha256=run.data_sha256,
            versions=library_versions(),
        )

    def _secure_content(self, session: Session, directory: Path, manifest: AdapterManifest) -> None:
        """Make sure that the objects are there when the row appears.

        Two jobs with the same specification make the same content, and one may retire it while the
        other publishes it. Both do so holding the base model's row.
        """
        self._lock_content(session)
        prefix = adapter_prefix(manifest.digest)
        present = {info.key for info in self._store.list(prefix)}
        if not {f"{prefix}/{name}" for name in (*ADAPTER_FILES, MANIFEST)} <= present:
            put_adapter(self._store, directory, manifest)

    def _lock_content(self, session: Session) -> None:
        session.execute(
            select(BaseModel.name).where(BaseModel.name == self._run.base.name).with_for_update()
        )

    def _retire_checkpoints(self) -> None:
        """Keep the newest checkpoints and the best; remove the rows of the others, then objects."""
        run = self._run
        with self._database.write() as session:
            job_runs.fence(session, run.job_id, run.attempt)
            rows = checkpoints.newest_first(session, run.job_id)
            kept = _kept(rows)
            for row in rows:
                if row.id not in kept:
                    checkpoints.delete(session, row.id)
        self._delete_states({row.object_prefix for row in rows if row.id in kept})
        for digest in {row.adapter_digest for row in rows if row.id not in kept}:
            with self._database.write() as session:
                self._lock_content(session)
                if not adapters.is_referenced(session, digest):
                    # Without its manifest, a set that is half deleted counts as absent.
                    for name in (MANIFEST, *ADAPTER_FILES):
                        self._store.delete(f"{adapter_prefix(digest)}/{name}")

    def _delete_states(self, kept_prefixes: set[str]) -> None:
        """Delete the states of this and earlier attempts that no row names; never a later one's."""
        for info in self._store.list(f"jobs/{self._run.job_id}/checkpoints"):
            prefix = info.key.rpartition("/")[0]
            attempt = int(prefix.rpartition("-a")[2])
            if prefix not in kept_prefixes and attempt <= self._run.attempt:
                self._store.delete(info.key)

    def _verify(self, trainer: Trainer, manifest: AdapterManifest, scratch: Path) -> None:
        """Read the adapter as an inference server would; it must be the trained weights exactly."""
        task = trainer.task
        try:
            stored = fetch_adapter(self._store, manifest.digest, scratch)
            batched = task.method.served(task.method_params) is Served.BATCHED
            if batched and task.objective.head == "causal_lm":
                read_adapter(scratch, stored.digest, module_shapes(task.model))
            found = load_file(scratch / ADAPTER_TENSORS)
        except (ValueError, AdapterFormatError) as error:
            raise _not_servable(str(error)) from error
        trained = published_tensors(trainer)
        for name, tensor in found.items():
            own = trained.pop(name, None)
            if own is None or not torch.equal(own, tensor):
                raise _not_servable(f"{name} is not what was trained")
        if trained:
            raise _not_servable(f"{len(trained)} trained tensors are not in the file")
        if not gives_same_logits(task.model, scratch):
            raise _not_servable("read back, it does not give the logits that were trained")

    def _put_results(self, last_step: int) -> File:
        """Store the results file and return its row, not yet added."""
        with self._database.read() as session:
            points = metrics.all_points(session, self._run.job_id)
        data = results_csv([point for point in points if point.step <= last_step])
        file_id = new_id("file-")
        self._store.put(upload_key(file_id), data)
        return File(
            id=file_id,
            project_id=self._run.project_id,
            purpose=RESULTS_PURPOSE,
            filename=RESULTS_NAME,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            object_key=upload_key(file_id),
            status=FileStatus.PROCESSED,
        )


def results_csv(points: Sequence[StepMetrics]) -> bytes:
    """Return the metrics as CSV: OpenAI's five columns first, all others after them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_OPENAI_COLUMNS, *_OWN_COLUMNS])
    for point in points:
        values = point.model_dump()
        names = [*_OPENAI_COLUMNS.values(), *_OWN_COLUMNS]
        writer.writerow(["" if values[name] is None else values[name] for name in names])
    return text.getvalue().encode()


def _kept(rows: Sequence[Checkpoint]) -> set[str]:
    """Return the ids of the checkpoints to keep: the newest, and the best on the validation set."""
    kept = {row.id for row in rows[:KEPT_CHECKPOINTS]}
    best = checkpoints.best(rows)
    return kept if best is None else kept | {best.id}


def _not_servable(detail: str) -> TrainingFailedError:
    return TrainingFailedError(
        f"The adapter cannot be served: {detail}. Its checkpoints are kept; please report this.",
        code="adapter_not_servable",
    )
