"""Several jobs in one trainer: from their rows to one joint run, each with an end of its own.

The base model is loaded once, every job has an adapter of its own on it, and ``joint`` trains them.
What ends one job, an error, a cancel, its last step, is told at once and leaves the others running;
each has its own attempt, reporter, checkpoints and publication, and can go on alone another time.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import structlog
import torch
from peft import PeftModel

from models.db import Database
from models.settings import Settings
from models.storage import ObjectStore, open_store
from worker.base_models import pick_device
from worker.training import exit_codes, methods
from worker.training.cost import CostMeter
from worker.training.ending import CODES, UNEXPECTED, end_by
from worker.training.forward import PackedForward, choose_forward
from worker.training.job import JobRun, Rows, Surroundings, base_of, task_of
from worker.training.joint import JointRun, Member
from worker.training.loop import Trainer
from worker.training.memory import can_cache_weights, is_out_of_memory
from worker.training.model import adapt
from worker.training.task import Outcome, Stop
from worker.training.warm import WarmBase

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Seat:
    """One job of the process. `exit_code` says how it ended, as a trainer's of its own would."""

    job_id: str
    attempt: int
    around: Surroundings
    run: JobRun
    rows: Rows | None = None
    member: Member | None = None
    exit_code: int | None = field(default=None)


class JobsTogether:
    """Trains jobs over one base model to their ends.

    Args:
        settings: Of this process.
        database: Where the jobs' rows are.
        orders: Job and attempt of each; all of one base model, precision and kind of method.
        asked: Whether somebody wants the job with this id to stop; asked before each of its steps.
        tell: Is told of every end, with the job's id and an exit code (``exit_codes``).
        warm: May hold the base model.
    """

    def __init__(
        self,
        settings: Settings,
        database: Database,
        orders: Sequence[tuple[str, int]],
        asked: Callable[[str], Stop | None],
        tell: Callable[[str, int], None],
        warm: WarmBase | None = None,
    ) -> None:
        self._database = database
        self._asked = asked
        self._tell = tell
        self._warm = warm or WarmBase()
        store = open_store(settings.storage)
        self._seats = [self._seat(settings, store, *order) for order in orders]

    def _seat(self, settings: Settings, store: ObjectStore, job_id: str, attempt: int) -> _Seat:
        scratch = settings.worker.scratch_dir.expanduser().resolve() / f"{job_id}-a{attempt}"
        around = Surroundings(settings, self._database, store, scratch, self._warm)
        return _Seat(job_id, attempt, around, JobRun(around, job_id, attempt))

    def run(self) -> None:
        """Train; the end of every job is told before this returns."""
        try:
            for seat in self._seats:
                with self._ending(seat):
                    shutil.rmtree(seat.around.scratch, ignore_errors=True)
                    seat.around.scratch.mkdir(parents=True)
                    seat.rows = seat.run.read()
            if len(self._open()) > 1:
                self._train(self._open())
            else:
                self._alone()
        except Exception as error:
            log.exception("joint_run_failed")
            for seat in self._open():
                self._end_by(seat, error)

    def _open(self) -> list[_Seat]:
        return [seat for seat in self._seats if seat.exit_code is None]

    def _alone(self) -> None:
        """Train the first job that is left as if it had come alone, and give the others back."""
        for seat in self._open()[1:]:
            self._end(seat, exit_codes.DRAINED)
        for seat in self._open():
            with self._ending(seat):
                outcome = seat.run.execute(partial(self._asked, seat.job_id))
                self._end(seat, CODES[outcome])

    def _train(self, seats: Sequence[_Seat]) -> None:
        device = pick_device("auto")
        model = self._load(seats, device)
        if model is None:
            return
        first = seats[0].rows
        assert first is not None
        cache = can_cache_weights(model, device)
        forward, reason = choose_forward(
            model, first.run.spec.precision, device, first.pad_id, cache_weights=cache
        )
        if not isinstance(forward, PackedForward):
            log.warning("jobs_cannot_share", n_jobs=len(seats), reason=reason)
            del model, forward
            self._alone()
            return
        for index, seat in enumerate(seats):
            if seat.exit_code is None:
                with self._ending(seat):
                    seat.member = self._member(seat, model, forward, _name(index), device)
        if self._open():
            self._run_joint()

    def _load(self, seats: Sequence[_Seat], device: str) -> PeftModel | None:
        """Load the base with an adapter for each job; None if no job's fits."""
        assert seats[0].rows is not None
        base = base_of(seats[0].rows, device, self._warm)
        model: PeftModel | None = None
        for index, seat in enumerate(seats):
            assert seat.rows is not None
            spec = seat.rows.run.spec
            method = methods.get_method(spec.peft["type"])
            params = methods.parse_params(spec.peft)
            with self._ending(seat):
                model = adapt(model or base, method, params, spec.seed, _name(index))
        return model

    def _run_joint(self) -> None:
        joint = JointRun([seat.member for seat in self._open() if seat.member is not None])
        log.info("joint_run_started", n_jobs=len(self._open()))
        joint.begin()
        goes_on = True
        while goes_on:
            goes_on = joint.round()
            for seat in self._open():
                self._conclude(seat)

    def _member(
        self, seat: _Seat, model: PeftModel, forward: PackedForward, adapter: str, device: str
    ) -> Member:
        """Make the trainer of a job, where its newest checkpoint left off."""
        rows, run = seat.rows, seat.run
        assert rows is not None
        task = task_of(rows, model, forward.for_adapter(adapter), device, adapter)
        trainer = Trainer(task, warn=run.reporter.warn)
        run.begin(trainer, rows.run)
        assert rows.run.base.shape is not None
        meter = CostMeter(self._database, seat.job_id, seat.attempt)
        meter.reckon(task, rows.run.base.shape)
        return Member(
            trainer,
            run.reporter,
            run.saver(rows.run),
            lambda: self._asked(seat.job_id),
            torch.get_rng_state(),
            {"job_id": seat.job_id},
        )

    def _conclude(self, seat: _Seat) -> None:
        """Publish and tell the end of a job whose member has ended."""
        member, rows = seat.member, seat.rows
        assert member is not None
        assert rows is not None
        ended = member.ended
        if isinstance(ended, Exception):
            self._end_by(seat, ended)
        elif ended is not None:
            with self._ending(seat):
                seat.run.reporter.flush()
                if ended is Outcome.FINISHED:
                    with _only(member.trainer.task.model, member.trainer.task.adapter):
                        seat.run.finish(member.trainer, rows.run)
                self._end(seat, CODES[ended])

    @contextmanager
    def _ending(self, seat: _Seat) -> Iterator[None]:
        """Have an error inside end this job, and not the others."""
        with structlog.contextvars.bound_contextvars(job_id=seat.job_id):
            try:
                yield
            except Exception as error:
                log.exception("attempt_ended_by_error")
                self._end_by(seat, error)

    def _end_by(self, seat: _Seat, error: Exception) -> None:
        if is_out_of_memory(error):
            # Alone there may be room for it: after a lost run a job has no company any more.
            log.warning("joint_job_out_of_memory", job_id=seat.job_id)
            self._end(seat, UNEXPECTED)
        else:
            self._end(seat, end_by(error, self._database, seat.job_id, seat.attempt))

    def _end(self, seat: _Seat, exit_code: int) -> None:
        seat.exit_code = exit_code
        shutil.rmtree(seat.around.scratch, ignore_errors=True)
        log.info("joint_job_ended", job_id=seat.job_id, exit_code=exit_code)
        self._tell(seat.job_id, exit_code)


def _name(index: int) -> str:
    """Return PEFT's name of the adapter of a job."""
    return f"job{index}"


@contextmanager
def _only(model: PeftModel, adapter: str) -> Iterator[None]:
    """Have PEFT's own passes go through one adapter; afterwards all others can learn again."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.set_adapter(adapter)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
