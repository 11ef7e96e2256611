"""The engine: the seam that the server talks to, and an implementation that batches decoding.

Prompts of like lengths share a forward pass; the sequences past their prompt then share passes
of one token each, whatever their adapters. Rows do not see each other: in float32 an answer has
the tokens that the same request gets alone.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Protocol

import torch
from transformers import PreTrainedModel

from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.errors import (
    EngineClosedError,
    EngineError,
    EngineFullError,
    GenerationError,
)
from worker.inference.engine.graphs import Record
from worker.inference.engine.params import Constraint, EngineStats, TokenEvent
from worker.inference.engine.pool import AdapterLease, AdapterPool
from worker.inference.engine.runner import Runner
from worker.inference.engine.sampler import Peak, peaks
from worker.inference.engine.scheduler import Limits, Scheduler
from worker.inference.engine.sequence import Request as Request
from worker.inference.engine.sequence import Sequence
from worker.inference.engine.stream import Decode, TextStream
from worker.inference.engine.weights import AdapterWeights
from worker.threads import in_passing_thread

Emit = Callable[[int, TokenEvent | EngineError], None]
"""Takes (choice, event) on the engine's thread; it must return at once and not raise."""

logger = logging.getLogger(__name__)


class Ticket(Protocol):
    """A submitted request."""

    def abort(self) -> None:
        """Stop at the next step boundary without further events; harmless when it has ended."""


class Engine(Protocol):
    """One base model on one device, with adapters. Every method is safe from any thread."""

    def acquire(self, digest: str) -> AdapterLease | None:
        """Return a lease on an adapter in memory, or None where it has to be loaded first."""

    def load(self, digest: str, directory: Path) -> AdapterLease:
        """Check the adapter in `directory` and bring it into memory; blocks, so not on a loop.

        Raises:
            AdapterFormatError: the files break a rule.
            AdapterPoolFullError: there is no room that could be made.
        """

    def unload(self, digest: str) -> int:
        """Take an adapter out of memory; return the bytes that this frees, 0 if it was not there.

        Raises:
            AdapterInUseError: requests are using it.
        """

    def audit(self) -> dict[str, int]:
        """Compare the counts of leases with the leases there are; return what was lost."""

    def submit(self, request: Request, emit: Emit) -> Ticket:
        """Queue a request and return at once; its events go to `emit`, each choice's in order.

        A choice ends with a `TokenEvent` that has a finish reason, or with an `EngineError`.

        Raises:
            EngineFullError: too many sequences wait already.
            EngineClosedError: the engine is closed.
        """

    def stats(self) -> EngineStats:
        """Return what the engine is doing right now."""

    def close(self) -> None:
        """End all sequences with `EngineClosedError` and stop; returns when the thread is gone."""


class _Ticket:
    def __init__(self, sequences: list[Sequence], changed: Condition) -> None:
        self._sequences = sequences
        self._changed = changed

    def abort(self) -> None:
        with self._changed:
            for sequence in self._sequences:
                sequence.aborted = True
            self._changed.notify_all()


class BatchingEngine:
    """Each step feeds a share of the prompts, then one token to all sequences past theirs.

    A model whose layers do not all attend to every token (sliding windows) decodes in turn.

    Args:
        model: A causal language model in evaluation mode; its linear layers get wrapped.
        decode: Token ids to text.
        stop_ids: Tokens that end an answer.
        fingerprint: What identifies the base model.
        limits: How much runs and waits at a time.
        record: Makes steps of decoding such that are played again (`engine.graphs`); None: none is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Decode,
        stop_ids: Iterable[int],
        *,
        fingerprint: str = "",
        limits: Limits | None = None,
        record: Record | None = None,
    ) -> None:
        limits = limits or Limits()
        self._model = model
        self._decode = decode
        self._stop_ids = frozenset(stop_ids)
        self._pool = AdapterPool(limits.adapter_bytes)
        self._runner = Runner(model, fingerprint, limits, record)
        self._changed = Condition()
        self._scheduler: Scheduler[Sequence] = Scheduler(limits)
        self._closing = False
        self._n_drawn = 0
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def acquire(self, digest: str) -> AdapterLease | None:
        return self._pool.acquire(digest)

    def load(self, digest: str, directory: Path) -> AdapterLease:
        layers, slots = self._runner.layers, self._runner.slots

        def prepared() -> AdapterWeights:
            adapter = read_adapter(directory, digest, layers.shapes)
            return slots.prepare(adapter.weights(layers.read))

        return self._pool.admit(in_passing_thread(prepared))

    def unload(self, digest: str) -> int:
        return self._pool.remove(digest)

    def audit(self) -> dict[str, int]:
        return self._pool.audit()

    def submit(self, request: Request, emit: Emit) -> Ticket:
        if not request.prompt:
            raise ValueError("A prompt needs at least one token.")
        make = request.constraint
        constraints = [make() if make is not None else None for _ in range(request.n)]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise EngineClosedError("The engine is closed.")
            if not self._scheduler.has_room(request.n):
                waiting = len(self._scheduler.waiting)
                raise EngineFullError(f"{waiting} sequences are waiting already.")
            sequences = [
                self._sequence(request, index, emit, constraint)
                for index, constraint in enumerate(constraints)
            ]
            self._scheduler.add(sequences)
            self._changed.notify_all()
        return _Ticket(sequences, self._changed)

    def _sequence(
        self, request: Request, index: int, emit: Emit, constraint: Constraint | None
    ) -> Sequence:
        seed = request.sampling.seed
        sampling = replace(request.sampling, seed=None if seed is None else seed + index)
        lease = request.lease.share() if request.lease is not None else None
        text = TextStream(self._decode, sampling.stop)
        own = replace(request, sampling=sampling)
        return Sequence(own, lease, text, partial(emit, index), constraint)

    def stats(self) -> EngineStats:
        with self._changed:
            scheduler = self._scheduler
            adapters = {each.adapter for each in scheduler.running if not each.ended} - {None}
            runner, slots = self._runner, self._runner.slots
            return EngineStats(
                alive=self._thread.is_alive() and not self._closing,
                running=scheduler.n_running(),
                waiting=len(scheduler.waiting),
                references=self._pool.references(),
                adapter_bytes=self._pool.n_bytes,
                slots=len(slots.digests()),
                distinct_adapters=len(adapters),
                waiting_for_slot=sum(each.overtaken > 0 for each in scheduler.waiting),
                host_evictions=self._pool.evictions,
                slot_evictions=slots.evictions,
                preemptions=scheduler.preemptions,
                n_drawn=self._n_drawn,
                n_prompt=runner.n_prompt,
                n_cached=runner.n_cached,
            )

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next_step():
                self._feed_prompts()
                self._step_rows()
        finally:
            with self._changed:
                self._closing = True
                left = [*self._scheduler.running, *self._scheduler.waiting]
                self._scheduler = Scheduler(self._scheduler.limits)
            for sequence in left:
                if not sequence.ended:
                    self._end(sequence, EngineClosedError("The engine was closed."))

    def _next_step(self) -> bool:
        """Drop what ended or was aborted, let the next ones in, wait for work; False to stop."""
        with self._changed:
            while True:
                scheduler = self._scheduler
                for sequence in [*scheduler.running, *scheduler.waiting]:
                    if sequence.aborted and not sequence.ended:
                        sequence.end()
                for sequence in [each for each in self._runner.decoding if each.ended]:
                    self._runner.leave(sequence)
                preempted, _ = scheduler.next_step()
                for sequence in preempted:
                    self._runner.leave(sequence)
                self._runner.slots.busy = {s.adapter for s in scheduler.running}
                if self._closing:
                    return False
                if scheduler.running:
                    return True
                self._changed.wait()

    def _feed_prompts(self) -> None:
        """Feed the prompts their share of the step; those that are done get a row."""
        running = self._scheduler.running
        lone = [(each, 1) for each in running if each.n_pending == 1 and not each.has_row]
        waiting = [*self._scheduler.shares(), *lone]
        while waiting := [(each, share) for each, share in waiting if not each.aborted]:
            sequences = self._runner.next_prompts(waiting)
            if len(sequences) == 1 or not self._feed_whole(sequences):
                for sequence in sequences:
                    self._feed(sequence, dict(waiting)[sequence])
            waiting = [(each, share) for each, share in waiting if each not in sequences]

    def _feed_whole(self, sequences: list[Sequence]) -> bool:
        """Feed whole prompts in one pass; False if that failed, and nothing has happened."""
        try:
            logits = self._runner.feed_whole(sequences)
        except Exception:
            # One of them broke the pass: each alone shows which.
            logger.warning("A pass of prompts failed; each is fed alone.", exc_info=True)
            return False
        for sequence, row_logits, peak in zip(sequences, logits, peaks(logits), strict=True):
            with self._isolated(sequence):
                self._begin_answer(sequence, row_logits, peak)
        return True

    def _feed(self, sequence: Sequence, share: int) -> None:
        """Feed at most `share` tokens of one prompt."""
        with self._isolated(sequence):
            logits = self._runner.feed(sequence, share)
            if logits is not None:
                self._begin_answer(sequence, logits)

    def _begin_answer(
        self, sequence: Sequence, logits: torch.Tensor, peak: Peak | None = None
    ) -> None:
        self._take(sequence, logits, peak)
        if not sequence.ended:
            self._runner.seat(sequence)

    def _step_rows(self) -> None:
        """Feed one token to every sequence that has a row."""
        decoding = self._runner.decoding
        for sequence in [each for each in decoding if each.ended or each.aborted]:
            self._runner.leave(sequence)
        if not decoding:
            return
        if len(decoding) == 1:  # its failure is its own: nothing to try again
            with self._isolated(decoding[0]):
                self._take(decoding[0], self._runner.decode(slice(0, 1))[0])
            return
        try:
            logits = self._runner.decode(slice(0, len(decoding)))
        except Exception:
            # One of them broke the pass: each alone shows which.
            logger.warning("A batch failed; its sequences are tried one by one.", exc_info=True)
            for row, sequence in enumerate(decoding):
                with self._isolated(sequence):
                    self._take(sequence, self._runner.decode(slice(row, row + 1))[0])
            return
        for sequence, row_logits, peak in zip(decoding, logits, peaks(logits), strict=True):
            with self._isolated(sequence):
                self._take(sequence, row_logits, peak)

    @contextmanager
    def _isolated(self, sequence: Sequence) -> Iterator[None]:
        """End `sequence`, and no other, with whatever goes wrong inside."""
        try:
            yield
        except GenerationError as error:
            self._end(sequence, error)
        except Exception as error:
            # The edge of one sequence: whatever broke it, the others go on.
            logger.exception("A sequence failed.")
            self._end(sequence, GenerationError(f"{type(error).__name__} while generating."))

    def _take(self, sequence: Sequence, logits: torch.Tensor, peak: Peak | None = None) -> None:
        event = sequence.take(logits, self._stop_ids, peak)
        self._n_drawn += 1
        if event.finish_reason is not None:
            self._end(sequence, event)
        elif event.text or event.prompt_logprobs:
            self._emit(sequence, event)

    def _end(self, sequence: Sequence, event: TokenEvent | EngineError) -> None:
        # The adapter is free before anybody learns of the end.
        sequence.end()
        self._emit(sequence, event)

    def _emit(self, sequence: Sequence, event: TokenEvent | EngineError) -> None:
        try:
            sequence.emit(event)
        except Exception:
            # Somebody else's code: it must not stop the engine.
            logger.exception("The receiver of a sequence failed; the sequence ends.")
            sequence.aborted = True
