"""The engine: the seam that the server talks to, and an implementation that batches decoding.

Prompts are fed one sequence at a time; the sequences past their prompt then share forward passes
of one token each, whatever their adapters. Rows do not see each other: in float32 an answer has
the tokens that the same request gets alone.
"""

import inspect
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel

from worker.inference.engine.adapters import read_adapter
from worker.inference.engine.errors import (
    EngineClosedError,
    EngineError,
    EngineFullError,
    GenerationError,
)
from worker.inference.engine.lora import ActiveAdapters, wrap_linears
from worker.inference.engine.params import Constraint, EngineStats, LinearShape, TokenEvent
from worker.inference.engine.pool import AdapterLease, AdapterPool
from worker.inference.engine.row_cache import RowCache, can_share_rows
from worker.inference.engine.sequence import Request as Request
from worker.inference.engine.sequence import Sequence
from worker.inference.engine.stream import Decode, TextStream

PREFILL_CHUNK = 512
"""Prompt tokens of one step, all sequences together: prompts hold up the streams no longer."""

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


def cache_argument(model: PreTrainedModel) -> str:
    """Return what `model` calls its key-value cache: it was renamed in transformers 5.

    Raises:
        ValueError: it takes none. Models ignore arguments that they do not know, so that every
            token would be answered as if nothing stood before it.
    """
    parameters = inspect.signature(type(model).forward).parameters
    for name in ("cache", "past_key_values"):
        if name in parameters:
            return name
    raise ValueError(f"{type(model).__name__} takes no key-value cache.")


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
        max_adapters: Adapters kept in memory.
        max_running: Sequences that run side by side; each holds a cache.
        max_waiting: Sequences that may wait for a turn.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Decode,
        stop_ids: Iterable[int],
        *,
        max_adapters: int = 16,
        max_running: int = 16,
        max_waiting: int = 64,
    ) -> None:
        self._model = model
        self._cache_argument = cache_argument(model)
        self._decode = decode
        self._stop_ids = frozenset(stop_ids)
        self._active = ActiveAdapters()
        self._linears: Mapping[str, LinearShape] = wrap_linears(model, self._active)
        self._pool = AdapterPool(max_adapters)
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._changed = Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._rows = RowCache()
        self._decoding: list[Sequence] = []  # its index is the row
        parameters = inspect.signature(type(model).forward).parameters
        self._shares_rows = can_share_rows(model.config, parameters)
        self._closing = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def acquire(self, digest: str) -> AdapterLease | None:
        return self._pool.acquire(digest)

    def load(self, digest: str, directory: Path) -> AdapterLease:
        weights = read_adapter(directory, digest, self._linears)
        return self._pool.admit(weights.to(self._model.device))

    def submit(self, request: Request, emit: Emit) -> Ticket:
        if not request.prompt:
            raise ValueError("A prompt needs at least one token.")
        make = request.constraint
        constraints = [make() if make is not None else None for _ in range(request.n)]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise EngineClosedError("The engine is closed.")
            free = self._max_running - self._n_running()
            if len(self._waiting) + request.n > self._max_waiting + free:
                raise EngineFullError(f"{len(self._waiting)} sequences are waiting already.")
            sequences = [
                self._sequence(request, index, emit, constraint)
                for index, constraint in enumerate(constraints)
            ]
            self._waiting.extend(sequences)
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
            running, waiting = self._n_running(), len(self._waiting)
        return EngineStats(
            alive=self._thread.is_alive() and not self._closing,
            running=running,
            waiting=waiting,
            references=self._pool.references(),
        )

    def _n_running(self) -> int:
        # Those that ended in this round are in the list until the next one begins.
        return sum(not sequence.ended for sequence in self._running)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._step_in_turn()
                self._step_rows()
        finally:
            with self._changed:
                self._closing = True
                left = [*self._running, *self._waiting]
                self._running = []
                self._waiting.clear()
            for sequence in left:
                if not sequence.ended:
                    self._end(sequence, EngineClosedError("The engine was closed."))

    def _admit(self) -> bool:
        """Drop what ended or was aborted, let the next ones in, wait for work; False to stop."""
        with self._changed:
            while True:
                for sequence in [*self._running, *self._waiting]:
                    if sequence.aborted and not sequence.ended:
                        sequence.end()
                self._running = [sequence for sequence in self._running if not sequence.ended]
                self._waiting = deque(s for s in self._waiting if not s.ended)
                while self._waiting and len(self._running) < self._max_running:
                    self._running.append(self._waiting.popleft())
                if self._closing:
                    return False
                if self._running:
                    return True
                self._changed.wait()

    def _step_in_turn(self) -> None:
        """Feed the sequences that have no row, together at most `PREFILL_CHUNK` tokens of prompts.

        Those whose prompt is done get a row, where the model allows it.
        """
        budget = PREFILL_CHUNK
        for sequence in self._running:
            if sequence.has_row or sequence.aborted or budget == 0:
                continue
            chunk = sequence.pending[:budget]
            if len(chunk) > 1:
                budget -= len(chunk)
            with self._isolated(sequence):
                logits = self._forward(sequence, chunk)
                if logits is None:
                    continue
                self._take(sequence, logits)
                if self._shares_rows and not sequence.ended and sequence.cache is not None:
                    self._rows.append(sequence.cache)
                    self._decoding.append(sequence)
                    sequence.has_row, sequence.cache = True, None

    def _step_rows(self) -> None:
        """Feed one token to every sequence that has a row."""
        for row in reversed(range(len(self._decoding))):
            if self._decoding[row].ended or self._decoding[row].aborted:
                self._rows.remove(row)
                self._decoding[row] = self._decoding[-1]
                self._decoding.pop()
        if not self._decoding:
            return
        everyone = slice(0, len(self._decoding))
        if len(self._decoding) == 1:  # its failure is its own: nothing to try again
            with self._isolated(self._decoding[0]):
                self._take(self._decoding[0], self._forward_rows(everyone)[0])
            return
        try:
            logits = self._forward_rows(everyone)
        except Exception:
            # One of them broke the pass: each alone shows which. Lengths have not advanced, so
            # that what the broken pass wrote is overwritten.
            logger.warning("A batch failed; its sequences are tried one by one.", exc_info=True)
            for row, sequence in enumerate(self._decoding):
                with self._isolated(sequence):
                    self._take(sequence, self._forward_rows(slice(row, row + 1))[0])
            return
        for sequence, row_logits in zip(self._decoding, logits, strict=True):
            with self._isolated(sequence):
                self._take(sequence, row_logits)

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

    def _take(self, sequence: Sequence, logits: torch.Tensor) -> None:
        event = sequence.take(logits, self._stop_ids)
        if event.finish_reason is not None:
            self._end(sequence, event)
        elif event.text or event.prompt_logprobs:
            self._emit(sequence, event)

    @torch.inference_mode()
    def _forward(self, sequence: Sequence, chunk: list[int]) -> torch.Tensor | None:
        """Feed the next pending tokens; return the logits [vocabulary] once all are fed."""
        if sequence.cache is None:
            sequence.cache = DynamicCache(config=self._model.config)
        sequence.pending = sequence.pending[len(chunk) :]
        self._active.use_one(sequence.lease.weights if sequence.lease is not None else None)
        output = self._model(
            input_ids=torch.tensor([chunk], device=self._model.device),
            use_cache=True,
            logits_to_keep=0 if sequence.scores_prompt else 1,
            **{self._cache_argument: sequence.cache},
        )
        if sequence.scores_prompt:
            sequence.score(output.logits[0])
        if sequence.pending:
            return None
        sequence.scores_prompt = False
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    @torch.inference_mode()
    def _forward_rows(self, rows: slice) -> torch.Tensor:
        """Feed the pending token of each of `rows`; return their logits [rows, vocabulary]."""
        sequences = self._decoding[rows]
        cache, positions, mask = self._rows.feed(rows, self._model.dtype)
        self._active.use_rows([s.lease.weights if s.lease is not None else None for s in sequences])
        output = self._model(
            input_ids=torch.tensor([s.pending for s in sequences], device=self._model.device),
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        self._rows.advance(rows)
        logits: torch.Tensor = output.logits[:, -1]
        return logits

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
