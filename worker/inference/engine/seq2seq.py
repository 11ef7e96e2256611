"""The engine of a model that reads one text and writes another, such as T5 or BART.

A source is encoded once; then its answers take turns with all others, one token each. There are no
adapters in it: an adapter has a model, and so an engine, of its own.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from worker.inference.engine.engine import Emit, Ticket
from worker.inference.engine.errors import (
    AdapterFormatError,
    EngineClosedError,
    EngineFullError,
    GenerationError,
)
from worker.inference.engine.params import EngineStats
from worker.inference.engine.pool import AdapterLease
from worker.inference.engine.runner import cache_argument
from worker.inference.engine.sequence import Request, Sequence
from worker.inference.engine.stream import Decode, TextStream

logger = logging.getLogger(__name__)


class _Answer:
    """One answer: the sequence that is written, and what was read for it."""

    def __init__(self, sequence: Sequence, source: tuple[int, ...]) -> None:
        self.sequence = sequence
        self.source = source
        self.encoded: Any = None
        self.cache = EncoderDecoderCache(DynamicCache(), DynamicCache())


class _Ticket:
    def __init__(self, answers: list[_Answer], changed: Condition) -> None:
        self._answers = answers
        self._changed = changed

    def abort(self) -> None:
        with self._changed:
            for answer in self._answers:
                answer.sequence.aborted = True
            self._changed.notify_all()


class Seq2SeqEngine:
    """An `Engine` whose prompts are sources.

    Args:
        model: An encoder-decoder in evaluation mode.
        decode: Token ids to text.
        stop_ids: Tokens that end an answer.
        max_running: How many answers take turns; more have to wait.
        max_waiting: How many may wait.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decode: Decode,
        stop_ids: Iterable[int],
        *,
        max_running: int = 32,
        max_waiting: int = 256,
    ) -> None:
        self._model: Any = model
        self._decode = decode
        self._stop_ids = frozenset(stop_ids)
        self._start = _first_tokens(model)
        self._cache_argument = cache_argument(model)
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._answers: list[_Answer] = []
        self._changed = Condition()
        self._closing = False
        self._n_drawn = 0
        self._n_prompt = 0
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def acquire(self, digest: str) -> AdapterLease | None:
        return None

    def load(self, digest: str, directory: Path) -> AdapterLease:
        raise AdapterFormatError(
            "unsupported_method", "adapters of an encoder-decoder have a model of their own"
        )

    def unload(self, digest: str) -> int:
        return 0

    def audit(self) -> dict[str, int]:
        return {}

    def submit(self, request: Request, emit: Emit) -> Ticket:
        if not request.prompt:
            raise ValueError("A source needs at least one token.")
        make = request.constraint
        constraints = [make() if make is not None else None for _ in range(request.n)]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise EngineClosedError("The engine is closed.")
            waiting = max(0, len(self._answers) - self._max_running)
            if len(self._answers) + request.n > self._max_running + self._max_waiting:
                raise EngineFullError(f"{waiting} sequences are waiting already.")
            answers = []
            for index, constraint in enumerate(constraints):
                seed = request.sampling.seed
                sampling = replace(request.sampling, seed=None if seed is None else seed + index)
                own = replace(request, prompt=self._start, sampling=sampling, scores_prompt=False)
                text = TextStream(self._decode, sampling.stop)
                sequence = Sequence(own, None, text, partial(emit, index), constraint)
                answers.append(_Answer(sequence, request.prompt))
            self._answers += answers
            self._n_prompt += len(request.prompt)
            self._changed.notify_all()
        return _Ticket(answers, self._changed)

    def stats(self) -> EngineStats:
        with self._changed:
            n_answers = len(self._answers)
            return EngineStats(
                alive=self._thread.is_alive() and not self._closing,
                running=min(n_answers, self._max_running),
                waiting=max(0, n_answers - self._max_running),
                n_drawn=self._n_drawn,
                n_prompt=self._n_prompt,
            )

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while running := self._next():
                for answer in running:
                    self._step(answer)
        finally:
            with self._changed:
                self._closing = True
                left, self._answers = self._answers, []
            for answer in left:
                if not answer.sequence.ended:
                    self._end(answer, EngineClosedError("The engine was closed."))

    def _next(self) -> list[_Answer]:
        """Drop what ended or was aborted, wait for work; an empty list to stop."""
        with self._changed:
            while True:
                for answer in self._answers:
                    if answer.sequence.aborted and not answer.sequence.ended:
                        answer.sequence.end()
                self._answers = [each for each in self._answers if not each.sequence.ended]
                if self._closing:
                    return []
                if self._answers:
                    return self._answers[: self._max_running]
                self._changed.wait()

    def _step(self, answer: _Answer) -> None:
        """Draw one token; whatever goes wrong ends this answer and no other."""
        sequence = answer.sequence
        if sequence.aborted:
            return
        try:
            event = sequence.take(self._logits(answer), self._stop_ids)
            self._n_drawn += 1
            if event.finish_reason is not None:
                self._end(answer, event)
            elif event.text:
                sequence.emit(event)
        except GenerationError as error:
            self._end(answer, error)
        except Exception as error:
            logger.exception("A sequence failed.")
            self._end(answer, GenerationError(f"{type(error).__name__} while generating."))

    @torch.inference_mode()
    def _logits(self, answer: _Answer) -> torch.Tensor:
        """Feed the pending tokens of an answer; return the logits [vocabulary] of the next."""
        device, sequence = self._model.device, answer.sequence
        source = torch.tensor([answer.source], device=device)
        if answer.encoded is None:
            answer.encoded = self._model.get_encoder()(
                input_ids=source, attention_mask=torch.ones_like(source), return_dict=True
            )
        pending = sequence.tokens[sequence.n_fed :]
        output = self._model(
            encoder_outputs=answer.encoded,
            attention_mask=torch.ones_like(source),
            decoder_input_ids=torch.tensor([pending], device=device),
            use_cache=True,
            **{self._cache_argument: answer.cache},
        )
        sequence.n_fed += len(pending)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _end(self, answer: _Answer, event: Any) -> None:
        answer.sequence.end()
        try:
            answer.sequence.emit(event)
        except Exception:
            # Somebody else's code: it must not stop the engine.
            logger.exception("The receiver of a sequence failed.")


def _first_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Return what an answer begins with: the decoder's start, and a first token that is forced.

    Raises:
        ValueError: the model's configuration does not tell.
    """
    generation: Any = model.generation_config
    config: Any = model.config
    start = generation.decoder_start_token_id
    if start is None:
        start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ValueError("The base model's configuration has no decoder_start_token_id.")
    forced = generation.forced_bos_token_id
    return (start,) if forced is None else (start, forced)
