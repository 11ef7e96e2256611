"""Several jobs over one base in one process: one pass for the rows of all, an update for each.

In a round every job makes one optimizer step. The micro-batches of small steps go through the model
together, each under its own adapter, so that every product with a frozen weight is made (and every
NF4 weight dequantised) once for all of them. Losses, gradients, clipping, schedules, optimizers,
checkpoints and random numbers stay apart: a job gives what it gives alone, within rounding, and
what ends one job ends only that. ``worker.training.together`` makes the members from jobs.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest

import structlog
import torch

from models.domain.reports import StepMetrics
from worker.training.forward import PackedForward
from worker.training.loop import Trainer
from worker.training.memory import is_out_of_memory
from worker.training.model import set_training
from worker.training.objectives.base import Example
from worker.training.packed import pool
from worker.training.task import SHARED_STEP_TOKENS, Outcome, Reporter, Scores, Stop, Task

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Member:
    """One job of a joint run.

    Args:
        trainer: Over the model that all members share, with an adapter of its own.
        reporter: Is told of every step; what it raises ends this job.
        save: Called when a checkpoint is due, with this job's random state as torch's.
        asked: Whether somebody wants this job to stop; asked before every step.
        rng_state: torch's CPU state that the job goes on from, uint8 [n]; that of its seed if None.
        about: What every line of the log says that is written for this job.
    """

    trainer: Trainer
    reporter: Reporter
    save: Callable[[Trainer, StepMetrics], None]
    asked: Callable[[], Stop | None]
    rng_state: torch.Tensor | None = None
    about: dict[str, str] = field(default_factory=dict)
    generator: torch.Generator = field(init=False)
    ended: Outcome | Exception | None = field(init=False, default=None)
    last: StepMetrics | None = field(init=False, default=None)
    saved: int = field(init=False)

    def __post_init__(self) -> None:
        self.saved = self.trainer.progress.step
        self.generator = torch.Generator()
        if self.rng_state is None:
            self.generator.manual_seed(self.trainer.task.spec.seed)
        else:
            self.generator.set_state(self.rng_state)

    @contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Make this job's random state torch's, and keep what became of it."""
        others = torch.get_rng_state()
        torch.set_rng_state(self.generator.get_state())
        try:
            yield
        finally:
            self.generator.set_state(torch.get_rng_state())
            torch.set_rng_state(others)


def can_share(task: Task) -> bool:
    """Tell whether the steps of `task` can go through its model together with other jobs'."""
    forward = task.forward
    return (
        isinstance(forward, PackedForward)
        and forward.mixes
        and task.objective.mixes(task.objective_params)
    )


class JointRun:
    """Trains its members to their ends.

    Args:
        members: At least one; their models are one and the same object.
        shared_tokens: Largest step, in tokens, that shares a pass; by device when omitted.

    Raises:
        ValueError: the members have different models, or two the same adapter.
    """

    def __init__(self, members: Sequence[Member], shared_tokens: int | None = None) -> None:
        tasks = [member.trainer.task for member in members]
        if len({id(task.model) for task in tasks}) != 1:
            raise ValueError("Jobs over different models cannot run together.")
        if len({task.adapter for task in tasks}) != len(tasks):
            raise ValueError("Each job needs an adapter of its own.")
        self._members = list(members)
        kind = torch.device(tasks[0].device).type
        self._shared_tokens = (
            SHARED_STEP_TOKENS.get(kind, SHARED_STEP_TOKENS["cpu"])
            if shared_tokens is None
            else shared_tokens
        )

    def run(self) -> list[Outcome | Exception]:
        """Train all members; return how each ended: its outcome, or the error that ended it.

        Raises:
            What torch raises in a shared pass, lack of memory aside: nobody can tell whose it is.
        """
        self.begin()
        while self.round():
            pass
        return [member.ended for member in self._members if member.ended is not None]

    def begin(self) -> None:
        """Do for each member what comes before its first step."""
        for member in self._members:
            with self._only_ending(member), member.own_random_numbers():
                member.trainer.begin(member.reporter)

    def _goes_on(self, member: Member) -> bool:
        """Tell whether a member makes another step; where not, note how it ended."""
        if member.ended is None:
            with self._only_ending(member):
                self._obey(member)
        return member.ended is None

    def _obey(self, member: Member) -> None:
        asked = member.asked()
        if asked is Stop.CANCEL:
            member.ended = Outcome.CANCELLED
        elif member.trainer.is_done:
            member.ended = Outcome.FINISHED
        elif asked is Stop.DRAIN:
            if member.last is not None and member.saved != member.last.step:
                self._save(member, member.last)
            member.ended = Outcome.DRAINED

    def round(self) -> bool:
        """Make one step of each member that goes on; False once there is none."""
        live = [member for member in self._members if self._goes_on(member)]
        rows = [member.trainer.next_examples() for member in live]
        small = [
            (member, examples)
            for member, examples in zip(live, rows, strict=True)
            if can_share(member.trainer.task) and _n_tokens(examples) <= self._shared_tokens
        ]
        together = small if len(small) > 1 and self._pass(small) else []
        for member in live:
            if not any(member is each for each, _ in together):
                with self._only_ending(member), member.own_random_numbers():
                    self._conclude(member, member.trainer.step())
        return bool(live)

    def _pass(self, small: Sequence[tuple[Member, list[Example]]]) -> bool:
        """Make a step of several members in shared passes; False where memory does not allow it."""
        started = time.perf_counter()
        before = [member.generator.get_state() for member, _ in small]
        set_training(small[0][0].trainer.task.model, True)
        try:
            scores = _shared_scores(small)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            for (member, _), state in zip(small, before, strict=True):
                member.trainer.optimizer.zero_grad(set_to_none=True)
                member.generator.set_state(state)
            pool.release()
            log.warning("shared_pass_out_of_memory", n_jobs=len(small), error=str(error)[:200])
            self._shared_tokens = 0
            return False
        for (member, examples), each in zip(small, scores, strict=True):
            with self._only_ending(member), member.own_random_numbers():
                self._conclude(member, member.trainer.update(examples, each, started))
        return True

    def _conclude(self, member: Member, measured: StepMetrics) -> None:
        trainer = member.trainer
        member.last = trainer.conclude(measured, member.reporter)
        if trainer.is_checkpoint_due(member.last):
            member.save(trainer, member.last)
            member.saved = member.last.step

    @staticmethod
    def _save(member: Member, point: StepMetrics) -> None:
        with member.own_random_numbers():
            member.save(member.trainer, point)

    @staticmethod
    @contextmanager
    def _only_ending(member: Member) -> Iterator[None]:
        """Have an error inside end this member, and not the others; `run` returns it."""
        with structlog.contextvars.bound_contextvars(**member.about):
            try:
                yield
            except Exception as error:
                log.exception("member_ended", adapter=member.trainer.task.adapter)
                member.ended = error
                member.trainer.optimizer.zero_grad(set_to_none=True)


def _n_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _shared_scores(small: Sequence[tuple[Member, list[Example]]]) -> list[Scores]:
    """Return the sums of a step of each member, and leave the gradients of their mean losses."""
    tasks = [member.trainer.task for member, _ in small]
    forward = tasks[0].forward
    assert isinstance(forward, PackedForward)
    n_trained = [sum(example.n_trained for example in examples) for _, examples in small]
    device = tasks[0].device
    losses = torch.zeros(len(small), dtype=torch.float64, device=device)
    hits = torch.zeros(len(small), dtype=torch.int64, device=device)
    parts = [member.trainer.micro_batches(examples) for member, examples in small]
    for groups in zip_longest(*parts):
        present = [index for index, group in enumerate(groups) if group is not None]
        sums = forward.cross_entropies(
            [tasks[index].objective.collate(groups[index], device) for index in present],
            [(tasks[index].adapter, small[index][0].generator) for index in present],
        )
        torch.stack(
            [each.loss / n_trained[index] for index, each in zip(present, sums, strict=True)]
        ).sum().backward()
        for index, each in zip(present, sums, strict=True):
            losses[index] += each.loss.detach()
            hits[index] += each.n_correct
    return [
        Scores(loss, n_correct, n)
        for loss, n_correct, n in zip(losses.tolist(), hits.tolist(), n_trained, strict=True)
    ]
