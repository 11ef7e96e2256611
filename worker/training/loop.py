"""The training loop: optimizer steps, validation, early stopping, checkpoints.

It knows no database and no store. What it finds goes to a `Reporter`; when a checkpoint is due it
calls back; whether to go on it asks. One step is one optimizer update, whose loss is the mean over
the trained tokens of *all* its rows, however many micro-batches it takes.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch

from models.domain.reports import StepMetrics
from models.errors import InvalidRequestError, TrainingFailedError
from worker.training import optimizers, recompute
from worker.training.batches import epoch_batches, micro_batches
from worker.training.memory import is_out_of_memory
from worker.training.model import set_training, trainable_parameters
from worker.training.objectives.base import Example
from worker.training.packed import pool
from worker.training.ranks import Ranks
from worker.training.schedule import rate_factor
from worker.training.task import Outcome, Progress, Reporter, Scores, Stop, Task

TOKENS_PER_MICRO_BATCH = {"cpu": 1536, "cuda": 16384}
VALIDATIONS_PER_EPOCH = 10


class Trainer:
    """One run: model, optimizer and progress; ``worker.training.checkpoint`` saves and restores it.

    Args:
        task: What is trained.
        token_budget: Most tokens in one forward pass; by device when omitted.
        warn: Takes sentences that the owner of the job should read.
        ranks: The processes that train together; this one alone when omitted.

    Raises:
        InvalidRequestError: early stopping without a validation file.
    """

    def __init__(
        self,
        task: Task,
        token_budget: int | None = None,
        warn: Callable[[str], None] = lambda _: None,
        ranks: Ranks | None = None,
    ) -> None:
        spec, numbers = task.spec, task.spec.hyperparameters
        assert spec.is_resolved
        assert isinstance(numbers.batch_size, int)
        assert isinstance(numbers.n_epochs, int)
        assert isinstance(spec.checkpoint_steps, int)
        assert isinstance(spec.optimizer.learning_rate, float)
        if spec.early_stopping is not None and not task.valid:
            raise InvalidRequestError(
                "early_stopping needs a validation_file to judge by.", param="early_stopping"
            )
        task.objective.prepare(task.model, task.objective_params)
        self.task = task
        self._warn = warn
        self._ranks = ranks or Ranks()
        self.progress = Progress()
        self.batch_size = numbers.batch_size
        self.checkpoint_steps = spec.checkpoint_steps
        self.steps_per_epoch = -(-len(task.train) // self.batch_size)
        self.total_steps = self.steps_per_epoch * numbers.n_epochs
        trainable = trainable_parameters(task.model, task.adapter)
        method, decay = task.method, spec.optimizer.weight_decay
        groups = {
            name: (method.rate_factor(name, task.method_params), decay * method.decays(name))
            for name in trainable
        }
        # In the order of the optimizer's groups, by which a checkpoint knows them.
        by_group = sorted(trainable, key=lambda name: groups[name])
        self.parameters = {name: trainable[name] for name in by_group}
        self.learning_rate = spec.optimizer.learning_rate
        kinds = [
            {"params": [trainable[n] for n in by_group if groups[n] == group]}
            | {"rate_factor": group[0], "weight_decay": group[1]}
            for group in sorted(set(groups.values()))
        ]
        self.optimizer = optimizers.build(spec.optimizer, kinds, self.learning_rate)
        self._first_token_budget = token_budget or TOKENS_PER_MICRO_BATCH.get(
            torch.device(task.device).type, TOKENS_PER_MICRO_BATCH["cpu"]
        )
        self._token_budget = self._first_token_budget
        self._may_recompute = recompute.is_possible(task.model)
        self._valid_interval = max(1, self.steps_per_epoch // VALIDATIONS_PER_EPOCH)
        self._lengths = lengths = [len(example.input_ids) for example in task.train]
        self._batches = lru_cache(maxsize=1)(
            lambda epoch: epoch_batches(lengths, self.batch_size, spec.seed, epoch)
        )

    def run(
        self,
        reporter: Reporter,
        save: Callable[["Trainer", StepMetrics], None],
        asked: Callable[[], Stop | None],
    ) -> Outcome:
        """Train from where `progress` stands to the end, or until asked to stop.

        Args:
            reporter: Is told of every step.
            save: Called when a checkpoint is due: every ``checkpoint_steps`` steps, after the last
                step, before the loop drains, and after each step that early stopping judges.
            asked: Whether somebody wants the loop to stop; asked before every step.

        Raises:
            TrainingFailedError: the loss or a gradient is not finite (``non_finite_loss``), or
                part of the adapter gets no gradient (``no_gradient``).
        """
        saved = self.progress.step
        metrics: StepMetrics | None = None
        self.begin(reporter)
        while not self.is_done:
            match asked():
                case Stop.CANCEL:
                    return Outcome.CANCELLED
                case Stop.DRAIN:
                    if metrics is not None and saved != self.progress.step:
                        save(self, metrics)
                    return Outcome.DRAINED
            metrics = self.conclude(self.step(), reporter)
            if self.is_checkpoint_due(metrics):
                save(self, metrics)
                saved = metrics.step
        return Outcome.CANCELLED if asked() is Stop.CANCEL else Outcome.FINISHED

    @property
    def is_done(self) -> bool:
        return self.progress.step >= self.total_steps or self.progress.stopped_early

    def begin(self, reporter: Reporter) -> None:
        """Do what comes before the next step of a run: probe the memory, score the untrained model.

        Raises:
            TrainingFailedError: the validation loss is not finite (``non_finite_loss``).
        """
        self._probe_memory()
        if self.progress.step == 0 and self.task.valid:
            scores = self.evaluate(self.task.valid)
            loss = self._finite_validation(scores)
            reporter.untrained(loss, scores.accuracy, self.total_steps)

    def conclude(self, metrics: StepMetrics, reporter: Reporter) -> StepMetrics:
        """Do what follows an update: validate, judge, report. Returns all metrics of the step.

        Raises:
            TrainingFailedError: the validation loss is not finite (``non_finite_loss``).
        """
        metrics = metrics.model_copy(update=self._validate(metrics.step))
        self._judge(metrics)
        reporter.step(metrics, self.progress, self.total_steps)
        return metrics

    def is_checkpoint_due(self, metrics: StepMetrics) -> bool:
        step = metrics.step
        # Early stopping goes back to the best step, so every one that was judged must be there.
        judged = self.task.spec.early_stopping is not None and metrics.full_valid_loss is not None
        return step % self.checkpoint_steps == 0 or step == self.total_steps or judged

    def _probe_memory(self) -> None:
        """Run the largest micro-batch there can be, unless a rehearsal has shown that it fits."""
        if self.progress.step >= self.total_steps:
            return
        longest = np.argsort([-n for n in self._lengths], kind="stable")[: self.batch_size]
        largest = [self.task.train[row] for row in longest.tolist()]
        known, sizes = self.task.rehearsed, [self._lengths[row] for row in longest.tolist()]
        if known and known.leaves_room_for(sizes, self.task.device):
            return
        run = partial(self._fitting, largest, only_first=True)
        set_training(self.task.model, True)
        with torch.random.fork_rng():
            if remark := self.task.method.first_pass(self.task, run):
                self._warn(remark)
        self.optimizer.zero_grad(set_to_none=True)

    def _fitting(self, examples: Sequence[Example], *, only_first: bool = False) -> Scores:
        """Return the sums of a training step; where memory runs out, try again in smaller parts.

        The step's rows and its loss stay the same, since nothing was updated; more micro-batches
        make it up. Dropout draws other numbers then.

        Raises:
            What torch raises when memory runs out even for one row at a time, its activations
                not kept.
        """
        longest = max(len(example.input_ids) for example in examples)
        while True:
            own, reason = None, "on another device"
            try:
                own = self._sums(examples, backward=True, only_first=only_first)
            except (RuntimeError, MemoryError) as error:
                can_shrink = self._token_budget >= longest or self._may_recompute
                if not is_out_of_memory(error) or not can_shrink:
                    raise
                reason = str(error).partition("\n")[0][:200]
            # Outside of the handler, whose error holds the tensors of the failed pass.
            if (scores := self._ranks.sum_scores(own)) is not None:
                self._ranks.sum_gradients(self.parameters.values())
                return scores
            self.optimizer.zero_grad(set_to_none=True)
            pool.release()
            if self._token_budget >= longest:
                self._token_budget = min(self._token_budget, self._largest_group(examples)) // 2
                remedy = f"a step is computed in parts of at most {self._token_budget:,} tokens"
            else:
                self._recompute()
                remedy = "activations are computed again instead of kept, which takes longer"
            self._warn(
                f"Memory ran out in step {self.progress.step + 1} ({reason}); from now on {remedy}."
                " Its rows, its loss and the order of the data stay the same."
            )

    def _recompute(self) -> None:
        """Turn activation checkpointing on, and try parts of the first size again."""
        recompute.enable(self.task.model)
        self._may_recompute = False
        self._token_budget = self._first_token_budget

    def _largest_group(self, examples: Sequence[Example]) -> int:
        groups = self.micro_batches(examples)
        return max(sum(len(example.input_ids) for example in group) for group in groups)

    def micro_batches(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Split the examples of a step into what goes through the model at a time."""
        return micro_batches(examples, self._token_budget, pads=self.task.forward.pads)

    def next_examples(self) -> list[Example]:
        """Return the rows of the next step."""
        epoch, at = divmod(self.progress.step, self.steps_per_epoch)
        return [self.task.train[row] for row in self._batches(epoch)[at]]

    def step(self) -> StepMetrics:
        """Make one optimizer update and return what it measured.

        Raises:
            TrainingFailedError: as `update` does.
        """
        started = time.perf_counter()
        examples = self.next_examples()
        set_training(self.task.model, True)
        self._ranks.seed_step(self.task.spec.seed, self.progress.step)
        scores = self._fitting(examples)
        return self.update(examples, scores, started)

    def update(self, examples: Sequence[Example], scores: Scores, started: float) -> StepMetrics:
        """Clip the gradients that are there, make the optimizer's update and count the step.

        Args:
            examples: The rows of the step.
            scores: Their sums, of the pass that left the gradients.
            started: When the step began, by `time.perf_counter`.

        Raises:
            TrainingFailedError: the loss or a gradient is not finite (``non_finite_loss``), or
                part of the adapter gets no gradient (``no_gradient``).
        """
        index = self.progress.step
        optimizer = self.task.spec.optimizer
        self._require_finite(scores.mean_loss, "loss", examples)
        if index == 0:
            self._require_gradients()
        self.task.method.before_update(self.task)
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), optimizer.max_grad_norm)
        )
        self._require_finite(norm, "gradient norm", examples)
        rate = self.learning_rate * rate_factor(
            optimizer.schedule, index, self.total_steps, optimizer.warmup_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.optimizer.step()
        self.task.method.after_update(self.task, index + 1, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        n_tokens = sum(len(example.input_ids) for example in examples)
        self.progress.step = index + 1
        self.progress.n_tokens += n_tokens
        return StepMetrics(
            step=index + 1,
            epoch=(index + 1) / self.steps_per_epoch,
            train_loss=scores.mean_loss,
            train_mean_token_accuracy=scores.accuracy,
            learning_rate=rate,
            grad_norm=norm,
            tokens=n_tokens,
            trained_tokens=scores.n_trained,
            tokens_per_second=n_tokens / max(time.perf_counter() - started, 1e-9),
        )

    def _sums(
        self, examples: Sequence[Example], *, backward: bool, only_first: bool = False
    ) -> Scores:
        """Run this rank's share of `examples`; `backward` adds its part of their gradient.

        The gradient is that of the mean loss of all of them. With `only_first`, the first
        micro-batch, which is a largest one, is all that is run.
        """
        task = self.task
        n_trained = sum(example.n_trained for example in examples)
        # Sums stay on the device, so that a GPU is waited for once a step.
        loss = torch.zeros((), dtype=torch.float64, device=task.device)
        n_correct = torch.zeros((), dtype=torch.int64, device=task.device)
        for group in self.micro_batches(self._ranks.share(examples)):
            batch = task.objective.collate(group, task.device)
            sums = task.objective.loss(task.forward, batch, task.objective_params)
            if backward:
                (sums.loss / n_trained).backward()
            loss += sums.loss.detach()
            n_correct += sums.n_correct
            if only_first:
                break
        return Scores(float(loss), int(n_correct), n_trained)

    def _validate(self, step: int) -> dict[str, float]:
        """Return the validation metrics that are due after `step`."""
        if not self.task.valid:
            return {}
        found: dict[str, float] = {}
        ends_epoch = step % self.steps_per_epoch == 0
        if ends_epoch or step % self._valid_interval == 0:
            n_rows = len(self.task.valid)
            start = (step // self._valid_interval) * self.batch_size
            rows = [(start + at) % n_rows for at in range(min(self.batch_size, n_rows))]
            small = self.evaluate([self.task.valid[row] for row in rows])
            found |= {
                "valid_loss": self._finite_validation(small),
                "valid_mean_token_accuracy": small.accuracy,
            }
        if ends_epoch:
            full = self.evaluate(self.task.valid)
            found |= {
                "full_valid_loss": self._finite_validation(full),
                "full_valid_mean_token_accuracy": full.accuracy,
            }
        return found

    def _finite_validation(self, scores: Scores) -> float:
        if not math.isfinite(scores.mean_loss):
            raise TrainingFailedError(
                f"The validation loss after step {self.progress.step} is {scores.mean_loss}. Lower "
                "the learning rate.",
                param="validation_file",
                code="non_finite_loss",
            )
        return scores.mean_loss

    def evaluate(self, examples: Sequence[Example]) -> Scores:
        """Return loss and hits of `examples` without dropout and without training."""
        set_training(self.task.model, False)
        with torch.no_grad():
            scores = self._ranks.sum_scores(self._sums(examples, backward=False))
        assert scores is not None
        return scores

    def _judge(self, metrics: StepMetrics) -> None:
        """Take a validation of the whole split into account for early stopping."""
        rule, loss, progress = self.task.spec.early_stopping, metrics.full_valid_loss, self.progress
        if rule is None or loss is None:
            return
        best = progress.best_valid_loss
        if best is None or loss < best - rule.min_delta:
            progress.best_valid_loss = loss
            progress.n_without_improvement = 0
        else:
            progress.n_without_improvement += 1
            progress.stopped_early = progress.n_without_improvement >= rule.patience

    def _require_finite(
        self, value: float, what: Literal["loss", "gradient norm"], examples: Sequence[Example]
    ) -> None:
        if not math.isfinite(value):
            lines = ", ".join(str(example.line) for example in examples)
            raise TrainingFailedError(
                f"The {what} of step {self.progress.step + 1} is {value}. Its rows are on lines "
                f"{lines} of the training file. Lower the learning rate, or look for odd text "
                "in these rows.",
                param="training_file",
                code="non_finite_loss",
            )

    def _require_gradients(self) -> None:
        """Raise if part of the adapter cannot learn, e.g. because something cut the graph."""
        for name, parameter in self.parameters.items():
            if not self.task.method.learns_first(name):
                continue
            gradient = parameter.grad
            if gradient is None or not gradient.isfinite().all() or not gradient.any():
                raise TrainingFailedError(
                    f"{name} has no usable gradient in the first step, so it would never learn. "
                    "Choose other target_modules.",
                    param="peft.target_modules",
                    code="no_gradient",
                )
