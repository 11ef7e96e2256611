"""One job from its row to its adapter: what `run` does between its start and its exit code."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from worker.base_models import BaseModelInfo, load_model, load_tokenizer, materialise, pick_device
from worker.chat import ChatRenderer
from worker.data.tokens import tokenizer_sha256
from worker.heads import Head
from worker.training import checkpoint, methods, objectives
from worker.training.cost import CostMeter
from worker.training.followers import gathered
from worker.training.forward import choose_forward
from worker.training.headed import headed_forward
from worker.training.loop import Trainer
from worker.training.memory import can_cache_weights
from worker.training.model import adapt
from worker.training.objectives.base import Example, Facts
from worker.training.prepare import DataFile, Param, Tools, file_gone, load_examples
from worker.training.publish import Publisher, RunIdentity
from worker.training.report import DatabaseReporter, Silence
from worker.training.stored_checkpoints import StoredCheckpoints
from worker.training.task import Outcome, Stop, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a job is trained with; `scratch` is a directory of its own."""

    settings: Settings
    database: Database
    store: ObjectStore
    scratch: Path


@dataclass(frozen=True, slots=True)
class Source:
    """The job's row and files as they were when the attempt began."""

    project_id: str
    spec: TrainingSpec
    training: DataFile
    validation: DataFile | None


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
        self._reporter = reporter or DatabaseReporter(around.database, job_id, attempt)
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
        source = self.load_source()
        directory, base = materialise(source.spec.model, around.settings.models, around.store)
        with around.database.write() as session:
            base_models.record_identity(session, base)
        task, run = self.prepare(source, directory, base, pick_device("auto"))
        publisher = Publisher(around.database, around.store, run)
        stored = StoredCheckpoints(
            around.database, around.store, run, around.scratch, self._reporter.warn
        )
        slots = around.settings.worker.slots
        with gathered(run, task.device, around.scratch, slots) as ranks:
            trainer = Trainer(task, warn=self._reporter.warn, ranks=ranks)
            checkpoint.require_room(trainer, around.scratch)
            self._current = stored.restore_newest(trainer)
            is_new = self._current is None
            if is_new:
                checkpoint.seed_everything(run.spec.seed)
                self._start_from_adapter(trainer, base)
            ranks.copy_path(self._current)
            ranks.copy_parameters(trainer.parameters.values())
            assert base.shape is not None
            meter.reckon(task, base.shape)
            with meter.training():
                outcome = trainer.run(
                    self._reporter, self._saver(publisher, base.name), ranks.agree(asked)
                )
        self._reporter.flush()
        if outcome is Outcome.FINISHED:
            last = trainer.progress
            best = stored.restore_best(trainer) if run.spec.early_stopping else None
            result = best or self._current
            assert result is not None
            publisher.adapter(trainer, result, around.scratch / "verify", last)
            if is_new and run.spec.num_devices == 1:  # estimates are of one device
                meter.record(task)
        return outcome

    def prepare(
        self, source: Source, directory: Path, base: BaseModelInfo, device: str
    ) -> tuple[Task, RunIdentity]:
        """Tokenise the rows, resolve the specification, load the model and attach the adapter."""
        around = self._around
        tokenizer = load_tokenizer(directory)
        renderer, tokenizer_digest = ChatRenderer(tokenizer), tokenizer_sha256(tokenizer)
        if renderer.uses_default_template and source.training.form == ChatRow.form:
            self._reporter.warn(
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
                self._reporter.warn,
            ),
        )
        spec = self._resolve(source.spec, given, len(train), base.n_parameters)
        pad_id = int(tokenizer.pad_token_id or 0)
        task, reason = _task(directory, spec, train, valid, pad_id=pad_id, device=device)
        if reason is not None:
            self._reporter.warn(
                f"Base model {base.name} cannot be trained without padding ({reason}); its own "
                "forward pass is used, which is slower and gives the same result."
            )
        run = RunIdentity(
            job_id=self._job_id,
            attempt=self._attempt,
            project_id=source.project_id,
            organization=around.settings.api.organization,
            spec=spec,
            data_sha256=source.training.data_sha256,
            base=base,
            template_sha256=renderer.template_sha256,
            chat_template=renderer.template_source,
            tokenizer_sha256=tokenizer_digest,
        )
        return task, run

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

    def _saver(
        self, publisher: Publisher, base_name: str
    ) -> Callable[[Trainer, StepMetrics], None]:
        """Return what the loop calls when a checkpoint is due."""

        def save(trainer: Trainer, point: StepMetrics) -> None:
            directory = self._around.scratch / f"step-{point.step}"
            checkpoint.save(trainer, directory, base_name)
            self._reporter.flush()  # a step that is not repeated must have its metrics
            publisher.checkpoint(directory, point)
            if self._current is not None:
                shutil.rmtree(self._current)
            self._current = directory

        return save


def _task(
    directory: Path,
    spec: TrainingSpec,
    train: Sequence[Example],
    valid: Sequence[Example],
    *,
    pad_id: int,
    device: str,
) -> tuple[Task, str | None]:
    """Return what is trained, and why not packed if so."""
    params = methods.parse_params(spec.peft)
    method = methods.get_method(spec.peft["type"])
    objective, objective_params = objectives.resolve(spec.objective)
    head = Head(objective.head, objective.n_outputs(objective_params), spec.seed)
    base = load_model(
        directory,
        precision=spec.precision.type,
        double_quant=spec.precision.double_quant,
        device=device,
        head=head,
    )
    model = adapt(base, method, params, spec.seed)
    reason: str | None = None
    if head.kind == "causal_lm":
        cache = can_cache_weights(model, device)
        forward, reason = choose_forward(model, spec.precision, device, pad_id, cache_weights=cache)
    else:
        forward = headed_forward(model, spec.precision, device, pad_id)
    task = Task(
        model=model,
        forward=method.wrap_forward(model, forward, params),
        method=method,
        method_params=params,
        objective=objective,
        objective_params=objective_params,
        spec=spec,
        train=train,
        valid=valid,
        device=device,
    )
    return task, reason


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
