"""One job from its row to its adapter: what `run` does between its start and its exit code."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from sqlalchemy.orm import Session

from models.db import Database
from models.domain.reports import DatasetReport, StepMetrics
from models.domain.rows import ChatRow
from models.domain.status import JobStatus
from models.domain.training import TrainingSpec
from models.errors import LeaseLostError, TrainingFailedError, UnprocessableError
from models.registry import base_models, job_runs
from models.settings import Settings
from models.storage import ObjectNotFoundError, ObjectStore
from models.tables import File, Job
from worker.adapter_format import fetch_adapter
from worker.base_models import BaseModelInfo, materialise, pick_device
from worker.chat import ChatRenderer
from worker.data.tokens import tokenizer_sha256
from worker.heads import Head
from worker.training import checkpoint, methods, objectives
from worker.training.cost import CostMeter
from worker.training.followers import gathered
from worker.training.forward import PaddedForward, choose_forward
from worker.training.headed import headed_forward
from worker.training.loop import Trainer
from worker.training.memory import can_cache_weights
from worker.training.methods.base import DEFAULT_ADAPTER
from worker.training.model import adapt, load_base
from worker.training.objectives.base import Example, Facts, LanguageForward
from worker.training.prepare import DataFile, Param, Tools, file_gone, load_examples
from worker.training.publish import Publisher, RunIdentity
from worker.training.report import DatabaseReporter, Silence
from worker.training.stored_checkpoints import StoredCheckpoints
from worker.training.task import Outcome, Stop, Task
from worker.training.warm import WarmBase

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a job is trained with; `scratch` is a directory of its own."""

    settings: Settings
    database: Database
    store: ObjectStore
    scratch: Path
    warm: WarmBase = field(default_factory=WarmBase)


@dataclass(frozen=True, slots=True)
class Source:
    """The job's row and files as they were when the attempt began."""

    project_id: str
    spec: TrainingSpec
    training: DataFile
    validation: DataFile | None


@dataclass(frozen=True, slots=True)
class Rows:
    """What a job trains on, and what of; `directory` holds its base model."""

    directory: Path
    train: Sequence[Example]
    valid: Sequence[Example]
    pad_id: int
    run: RunIdentity


class JobRun:
    """One attempt at one job.

    Args:
        around: Settings, database, store, scratch directory.
        job_id: The job.
        attempt: The fencing token.
        reporter: Is told of progress; the job's row when omitted.
    """

    def __init__(
        self, around: Surroundings, job_id: str, attempt: int, reporter: Silence | None = None
    ) -> None:
        self._around = around
        self._job_id = job_id
        self._attempt = attempt
        self.reporter = reporter or DatabaseReporter(around.database, job_id, attempt)
        self._current: Path | None = None
        """The directory of the newest state on the local disk."""

    def execute(self, asked: Callable[[], Stop | None]) -> Outcome:
        """Train, resuming from the newest good checkpoint, and publish.

        Args:
            asked: Whether somebody wants the run to stop; asked before every step.

        Raises:
            LeaseLostError: another attempt owns the job.
            TuneryError: the job cannot end well.
        """
        around = self._around
        meter = CostMeter(around.database, self._job_id, self._attempt)
        rows = self.read()
        task = self.prepare(rows, pick_device("auto"))
        slots = around.settings.worker.slots
        with gathered(rows.run, task.device, around.scratch, slots) as ranks:
            trainer = Trainer(task, warn=self.reporter.warn, ranks=ranks)
            is_new = self.begin(trainer, rows.run)
            ranks.copy_path(self._current)
            ranks.copy_parameters(trainer.parameters.values())
            assert rows.run.base.shape is not None
            meter.reckon(task, rows.run.base.shape)
            with meter.training():
                outcome = trainer.run(self.reporter, self.saver(rows.run), ranks.agree(asked))
        self.reporter.flush()
        if outcome is Outcome.FINISHED:
            self.finish(trainer, rows.run)
            if is_new and rows.run.spec.num_devices == 1:  # estimates are of one device
                meter.record(task)
        return outcome

    def begin(self, trainer: Trainer, run: RunIdentity) -> bool:
        """Put the trainer to where its run goes on; return whether that is its very beginning.

        Raises:
            TrainingFailedError: the disk is too full, or the adapter that the job goes on from is
                of no use.
        """
        with self._around.database.write() as session:
            base_models.record_identity(session, run.base)
        checkpoint.require_room(trainer, self._around.scratch)
        self._current = self._stored(run).restore_newest(trainer)
        if self._current is not None:
            return False
        checkpoint.seed_everything(run.spec.seed)
        self._start_from_adapter(trainer, run.base)
        return True

    def finish(self, trainer: Trainer, run: RunIdentity) -> None:
        """Publish what a trainer that came to its end has made, and end the job well.

        Raises:
            LeaseLostError: another attempt owns the job.
            TrainingFailedError: the adapter cannot be read back (``adapter_not_servable``).
        """
        around, last = self._around, trainer.progress
        best = self._stored(run).restore_best(trainer) if run.spec.early_stopping else None
        result = best or self._current
        assert result is not None
        publisher = Publisher(around.database, around.store, run)
        publisher.adapter(trainer, result, around.scratch / "verify", last)

    def _stored(self, run: RunIdentity) -> StoredCheckpoints:
        around = self._around
        return StoredCheckpoints(
            around.database, around.store, run, around.scratch, self.reporter.warn
        )

    def read(self) -> Rows:
        """Read the job's row and files: tokenise what it trains on, resolve its specification.

        Raises:
            LeaseLostError: another attempt owns the job.
            TuneryError: the job cannot end well.
        """
        around = self._around
        source = self.load_source()
        directory, base = materialise(source.spec.model, around.settings.models, around.store)
        tokenizer = around.warm.tokenizer(directory)
        renderer, tokenizer_digest = ChatRenderer(tokenizer), tokenizer_sha256(tokenizer)
        if renderer.uses_default_template and source.training.form == ChatRow.form:
            self.reporter.warn(
                f"Base model {base.name} has no chat template; conversations are written in "
                "Tunery's default one, which the adapter keeps and is served with."
            )
        given = self._settled(source, base, tokenizer)
        train, valid = load_examples(
            source.training,
            source.validation,
            given,
            min(
                given.max_seq_length,
                base.max_length - methods.virtual_tokens(given.peft),
                tokenizer.model_max_length,
            ),
            Tools(
                around.store,
                around.scratch,
                directory,
                renderer,
                tokenizer_digest,
                self.reporter.warn,
            ),
        )
        run = RunIdentity(
            job_id=self._job_id,
            attempt=self._attempt,
            project_id=source.project_id,
            organization=around.settings.api.organization,
            spec=self._resolve(source.spec, given, len(train), base.n_parameters),
            data_sha256=source.training.data_sha256,
            base=base,
            template_sha256=renderer.template_sha256,
            chat_template=renderer.template_source,
            tokenizer_sha256=tokenizer_digest,
        )
        return Rows(directory, train, valid, int(tokenizer.pad_token_id or 0), run)

    def prepare(self, rows: Rows, device: str) -> Task:
        """Load the model and attach the adapter."""
        task, reason = _task(rows, device, self._around.warm)
        if reason is not None:
            self.reporter.warn(
                f"Base model {rows.run.base.name} cannot be trained without padding ({reason}); "
                "its own forward pass is used, which is slower and gives the same result."
            )
        return task

    @staticmethod
    def _settled(
        source: Source, base: BaseModelInfo, tokenizer: "PreTrainedTokenizerBase"
    ) -> TrainingSpec:
        """Return the specification with what its objective learns from the data and the base."""
        objective, params = objectives.resolve(source.spec.objective)
        assert base.shape is not None
        objective.require_base(base.shape.family)
        mask_id = tokenizer.mask_token_id
        facts = Facts(source.training.labels, None if mask_id is None else int(mask_id))
        settled = objective.settled(params, facts).model_dump()
        return source.spec.model_copy(update={"objective": settled})

    def load_source(self) -> Source:
        """Return the job as it is now. Raises `LeaseLostError` unless this attempt owns it."""
        with self._around.database.read() as session:
            job = session.get(Job, self._job_id)
            if job is None or job.attempt != self._attempt or job.status != JobStatus.RUNNING:
                raise LeaseLostError(f"Attempt {self._attempt} does not own job {self._job_id}.")
            validation = None
            if job.validation_file is not None:
                validation = _data_file(session, job.validation_file, "validation_file")
            return Source(
                job.project_id,
                TrainingSpec.model_validate(job.spec),
                _data_file(session, job.training_file, "training_file"),
                validation,
            )

    def _resolve(
        self, known: TrainingSpec, spec: TrainingSpec, n_rows: int, n_parameters: int
    ) -> TrainingSpec:
        """Return `spec` with numbers for all "auto"; recorded unless it is what the job has."""
        objective = objectives.get_objective(spec.objective["type"])
        scale = objective.rate_scale * methods.get_method(spec.peft["type"]).rate_scale
        resolved = spec.resolved(n_rows, n_parameters, scale)
        if resolved == known:
            return known
        with self._around.database.write() as session:
            job_runs.record_spec(session, self._job_id, self._attempt, resolved)
        return resolved

    def _start_from_adapter(self, trainer: Trainer, base: BaseModelInfo) -> None:
        """Take over the weights of the adapter that the job goes on from, if there is one.

        Raises:
            TrainingFailedError: it is gone, damaged, or of another base or method.
        """
        start = trainer.task.spec.init_adapter
        if start is None:
            return
        directory = self._around.scratch / "start"
        try:
            if start.base_fingerprint != base.fingerprint:
                raise ValueError("the base model has changed since it was trained")
            fetch_adapter(self._around.store, start.digest, directory)
            checkpoint.start_from(trainer, directory)
        except ObjectNotFoundError:
            raise _no_start(start.name, "it was deleted") from None
        except (UnprocessableError, ValueError) as error:
            raise _no_start(start.name, str(error)) from error

    def saver(self, run: RunIdentity) -> Callable[[Trainer, StepMetrics], None]:
        """Return what the loop calls when a checkpoint is due."""
        publisher = Publisher(self._around.database, self._around.store, run)

        def save(trainer: Trainer, point: StepMetrics) -> None:
            directory = self._around.scratch / f"step-{point.step}"
            checkpoint.save(trainer, directory, run.base.name)
            self.reporter.flush()  # a step that is not repeated must have its metrics
            publisher.checkpoint(directory, point)
            if self._current is not None:
                shutil.rmtree(self._current)
            self._current = directory

        return save


def _task(rows: Rows, device: str, warm: WarmBase) -> tuple[Task, str | None]:
    """Return what is trained, and why not packed if so."""
    spec = rows.run.spec
    if (ready := warm.take_rehearsed(rows.run.base.fingerprint, spec)) is not None:
        # What it has counted is of a pass as this objective's are.
        memory = ready.memory if spec.objective["type"] == "sft" else None
        return replace(task_of(rows, ready.model, ready.forward, device), rehearsed=memory), None
    params = methods.parse_params(spec.peft)
    method = methods.get_method(spec.peft["type"])
    base = base_of(rows, device, warm)
    model = adapt(base, method, params, spec.seed)
    reason: str | None = None
    forward: LanguageForward
    is_causal = objectives.get_objective(spec.objective["type"]).head == "causal_lm"
    if is_causal and not spec.packing:
        forward = PaddedForward(model, spec.precision, device, rows.pad_id)
    elif is_causal:
        cache = can_cache_weights(model, device)
        forward, reason = choose_forward(
            model, spec.precision, device, rows.pad_id, cache_weights=cache
        )
    else:
        forward = headed_forward(model, spec.precision, device, rows.pad_id)
    return task_of(rows, model, forward, device), reason


def base_of(rows: Rows, device: str, warm: WarmBase) -> "PreTrainedModel":
    """Return the base model of a job, warm or loaded, with the head that its objective needs."""
    spec = rows.run.spec
    objective, params = objectives.resolve(spec.objective)
    head = Head(objective.head, objective.n_outputs(params), spec.seed)
    model = warm.take(rows.run.base.fingerprint, spec.precision, head)
    return model or load_base(rows.directory, spec.precision, device, head)


def task_of(
    rows: Rows,
    model: "PeftModel",
    forward: LanguageForward,
    device: str,
    adapter: str = DEFAULT_ADAPTER,
) -> Task:
    """Return a job's task over a model that has its adapter, by the name `adapter`."""
    spec = rows.run.spec
    params = methods.parse_params(spec.peft)
    method = methods.get_method(spec.peft["type"])
    objective, objective_params = objectives.resolve(spec.objective)
    return Task(
        model=model,
        forward=method.wrap_forward(model, forward, params),
        method=method,
        method_params=params,
        objective=objective,
        objective_params=objective_params,
        spec=spec,
        train=rows.train,
        valid=rows.valid,
        device=device,
        adapter=adapter,
    )


def _no_start(name: str, reason: str) -> TrainingFailedError:
    return TrainingFailedError(
        f"Training cannot go on from {name}: {reason}. Start from the base model or another one.",
        param="model",
        code="start_not_usable",
    )


def _data_file(session: Session, file_id: str, param: Param) -> DataFile:
    file = session.get(File, file_id)
    if file is None:
        raise file_gone(file_id, param)
    if file.rows_key is None or file.data_sha256 is None:
        # Another attempt will find it linted: a worker does so within seconds.
        raise RuntimeError(f"File {file_id} is not linted yet.")
    report = DatasetReport.model_validate(file.report)
    n_faulty = report.n_rows - report.n_valid_rows
    labels = None if report.labels_are_cut else tuple(sorted(report.labels))
    return DataFile(file_id, param, file.rows_key, file.data_sha256, n_faulty, report.form, labels)
