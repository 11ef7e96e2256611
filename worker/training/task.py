"""What a run is given and what it tells: its task, its progress, its scores, how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from models.domain.reports import StepMetrics
from models.domain.training import TrainingSpec
from worker.training.methods.base import DEFAULT_ADAPTER, Method, MethodParams
from worker.training.objectives.base import Example, LanguageForward, Objective, ObjectiveParams

if TYPE_CHECKING:
    from peft import PeftModel

    from worker.training.memory import PassMemory


SHARED_STEP_TOKENS = {"cpu": 256, "cuda": 4096}
"""Steps of more tokens fill the device alone, and go through it alone. Not measured yet."""


class Stop(StrEnum):
    """What somebody outside asks of the loop; it is obeyed between two steps."""

    DRAIN = "drain"
    CANCEL = "cancel"


class Outcome(StrEnum):
    FINISHED = "finished"
    DRAINED = "drained"
    CANCELLED = "cancelled"


@dataclass(slots=True)
class Progress:
    """What a run has done so far; part of every checkpoint.

    `step` is also the cursor into the data, since the batches of an epoch follow from the seed.
    `n_tokens` counts the tokens of all rows so far, padding excluded. `best_valid_loss` and
    `n_without_improvement` belong to early stopping.
    """

    step: int = 0
    n_tokens: int = 0
    best_valid_loss: float | None = None
    n_without_improvement: int = 0
    stopped_early: bool = False


class Reporter(Protocol):
    """Where the loop tells of its steps; an implementation may raise to end the run."""

    def untrained(self, loss: float, accuracy: float, total_steps: int) -> None:
        """Take the scores of the validation split before the first step."""

    def step(self, metrics: StepMetrics, progress: Progress, total_steps: int) -> None:
        """Take the metrics of one step."""


@dataclass(frozen=True, slots=True)
class Task:
    """What is trained on what. `spec` is resolved; `valid` is empty without a validation file."""

    model: "PeftModel"
    forward: LanguageForward
    method: Method
    method_params: MethodParams
    objective: Objective
    objective_params: ObjectiveParams
    spec: TrainingSpec
    train: Sequence[Example]
    valid: Sequence[Example]
    device: str
    adapter: str = DEFAULT_ADAPTER
    """PEFT's name of what is trained; several tasks over one model have one each."""
    rehearsed: "PassMemory | None" = None
    """What a pass like those of this task kept, where one was made already."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over trained tokens."""

    loss: float
    n_correct: int
    n_trained: int

    @property
    def mean_loss(self) -> float:
        return self.loss / self.n_trained

    @property
    def accuracy(self) -> float:
        return self.n_correct / self.n_trained
