"""What an inference server does, without HTTP: admit a request and see it through."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, replace

from models.domain.base import JsonObject
from models.domain.encoding import EncodeAnswer, EncodeRequest
from models.domain.generation import (
    AdapterRef,
    GenerateRequest,
    PreviewRequest,
)
from models.errors import CapacityError, ConflictError, InvalidRequestError
from worker.base_models import BaseModelInfo
from worker.chat import ChatRenderer
from worker.inference.answer import Answer, shutting_down
from worker.inference.engine.engine import Engine, Request
from worker.inference.engine.errors import EngineClosedError, EngineFullError
from worker.inference.engine.grammar import Grammar, Vocabulary
from worker.inference.engine.params import EngineStats, Sampling
from worker.inference.engine.pool import AdapterLease
from worker.inference.metrics import Metrics, OwnModelStats
from worker.inference.output_format import grammar_of, names_of
from worker.inference.own_models import OwnModels
from worker.inference.previewer import Previewer
from worker.inference.residency import Residency
from worker.inference.tool_stream import ToolStream
from worker.inference.writer import ChunkWriter, Echo


@dataclass(frozen=True, slots=True)
class _Plan:
    """How the output of a request is made."""

    grammar: Grammar | None
    writer: ChunkWriter


class InferenceService:
    """One base model, its engine and its adapters.

    Args:
        engine: What generates.
        renderer: What turns messages into token ids.
        vocabulary: The tokens of the base model, for output formats and log-probabilities.
        residency: What brings adapters into the engine.
        base: The base model that the engine holds.
        description: What else `health` tells: ``precision`` and ``device``.
    """

    def __init__(
        self,
        engine: Engine,
        renderer: ChatRenderer,
        residency: Residency,
        base: BaseModelInfo,
        description: dict[str, str],
    ) -> None:
        self.engine = engine
        self.draining = False
        self.previewer: Previewer | None = None
        self.own_models: OwnModels | None = None
        self.metrics = Metrics()
        self._renderer = renderer
        self._rendering = asyncio.Lock()  # a tokenizer serves one thread at a time
        self._vocabulary = Vocabulary(renderer.tokenizer, renderer.stop_ids)
        self._residency = residency
        self._base = base
        self._description = description

    @asynccontextmanager
    async def answer(self, request: GenerateRequest) -> AsyncIterator[Answer]:
        """Admit a request; leaving the block ends its sequences and gives its adapter back.

        Raises:
            TuneryError: it is refused (the class tells why).
        """
        if self.draining:
            raise shutting_down()
        if request.base_model != self._base.name:
            raise ConflictError(
                f"This server holds base model {self._base.name!r}, not {request.base_model!r}.",
                param="model",
                code="wrong_base_model",
            )
        async with self._rendering:
            prompt = await asyncio.to_thread(self._prompt, request)
        planned = await asyncio.to_thread(self._plan, request, prompt)
        sampling = self._sampling(request, len(prompt))
        adapter = request.adapter
        async with self._place(adapter) as (engine, lease):
            answer = Answer(
                n=request.sampling.n,
                prompt_tokens=len(prompt),
                system_fingerprint=self.system_fingerprint(adapter),
                writer=planned.writer,
            )
            try:
                ticket = engine.submit(
                    Request(
                        prompt,
                        sampling,
                        request.sampling.n,
                        lease,
                        planned.grammar,
                        scores_prompt=request.echo and sampling.logprobs is not None,
                    ),
                    answer.emit,
                )
            except EngineFullError:
                raise CapacityError(
                    "The inference server is full. Send the request again in a moment.",
                    retry_after=2,
                ) from None
            except EngineClosedError:
                raise shutting_down() from None
            try:
                yield answer
            finally:
                ticket.abort()

    @asynccontextmanager
    async def _place(
        self, adapter: AdapterRef | None
    ) -> AsyncIterator[tuple[Engine, AdapterLease | None]]:
        """Give the engine that answers with `adapter`, and the lease that it needs for that."""
        own_models = self.own_models
        async with own_models.hold(adapter) if own_models else nullcontext() as own:
            if own is not None:
                yield own, None
                return
            lease = None if adapter is None else await self._residency.acquire(adapter)
            with lease or nullcontext():
                yield self.engine, lease

    def _prompt(self, request: GenerateRequest) -> tuple[int, ...]:
        """Return the ids of the prompt; all that needs the tokenizer is ready then.

        Raises:
            InvalidRequestError: the template or a token refuses.
        """
        scores = request.sampling.logprobs is not None
        if scores or request.echo or request.tools or request.json_schema is not None:
            self._vocabulary.load()
        names_of(request.tools)
        if request.messages is not None:
            return tuple(self._renderer.prompt_ids(request.messages, request.tools))
        if isinstance(request.prompt, str):
            ids = tuple(self._renderer.text_ids(request.prompt))
        else:
            ids = tuple(request.prompt or ())
            self._check_tokens(ids, "prompt")
        if not ids:
            raise InvalidRequestError("The prompt is empty.", param="prompt")
        return ids

    def _plan(self, request: GenerateRequest, prompt: tuple[int, ...]) -> _Plan:
        """Prepare the output; a large grammar takes a while, and holds up nobody else's prompt.

        Raises:
            InvalidRequestError: a schema cannot be followed.
        """
        grammar = grammar_of(request, lambda: self._renderer.tool_syntax, self._vocabulary)
        tools = []
        if request.tools:
            names = frozenset(names_of(request.tools))
            tools = [
                ToolStream(self._renderer.tool_syntax, names, parallel=request.parallel_tool_calls)
                for _ in range(request.sampling.n)
            ]
        echo = None
        if request.echo:
            text = request.prompt
            if not isinstance(text, str):
                text = b"".join(map(self._vocabulary.bytes_of, prompt)).decode(errors="replace")
            echo = Echo(text, prompt)
        return _Plan(grammar, ChunkWriter(self._vocabulary, tools, echo))

    def _check_tokens(self, ids: Iterable[int], param: str) -> None:
        for token in ids:
            if not 0 <= token < self._base.vocab_size:
                raise InvalidRequestError(
                    f"{param} holds token {token}; {self._base.name!r} has the tokens 0 to "
                    f"{self._base.vocab_size - 1}.",
                    param=param,
                )

    def _sampling(self, request: GenerateRequest, prompt_tokens: int) -> Sampling:
        params = request.sampling
        wanted = params.max_tokens
        room = self._room(prompt_tokens)
        if room < (0 if wanted == 0 else 1):
            raise InvalidRequestError(
                f"The input has {prompt_tokens} tokens, but {self._base.name!r} takes "
                f"{self._base.max_length} with the answer. Shorten it.",
                param="messages" if request.messages is not None else "prompt",
                code="context_length_exceeded",
            )
        if "" in params.stop:
            raise InvalidRequestError("A stop string must not be empty.", param="stop")
        self._check_tokens(params.logit_bias, "logit_bias")
        fields = params.model_dump(exclude={"n"})
        return Sampling(**fields | {"max_tokens": room if wanted is None else min(wanted, room)})

    def _room(self, prompt_tokens: int) -> int:
        """Return how many tokens an answer may have; below 1 where the prompt is too long."""
        return self._base.max_length - prompt_tokens

    def system_fingerprint(self, adapter: AdapterRef | None) -> str:
        """Return ``fp_BASE`` or ``fp_BASE_ADAPTER``: 12 digits of fingerprint and digest each."""
        base = f"fp_{self._base.fingerprint[:12]}"
        return base if adapter is None else f"{base}_{adapter.digest[:12]}"

    async def warm(self, adapter: AdapterRef) -> None:
        """Bring an adapter into memory; raises what admitting a request for it would."""
        if self.draining:
            raise shutting_down()
        async with self._place(adapter):
            pass

    async def preview(self, request: PreviewRequest) -> JsonObject:
        """Show rows of a data set; raises what ``Previewer.preview`` does."""
        if self.draining or self.previewer is None:
            raise shutting_down()
        return await asyncio.to_thread(self.previewer.preview, request)

    async def encode(self, request: EncodeRequest) -> EncodeAnswer:
        """Refuse: only an encoder fills masks, classifies and embeds."""
        raise InvalidRequestError(
            f"{self._base.name!r} is no encoder. Ask it at /v1/chat/completions, or name a model "
            "on an encoder.",
            param="model",
            code="wrong_kind_of_model",
        )

    def stats(self) -> EngineStats:
        """Return what the engine does; what runs on models beside the base counts as well."""
        own = self.own_models.stats() if self.own_models is not None else []
        stats = self.engine.stats()
        return replace(
            stats,
            running=stats.running + sum(each.running for each in own),
            waiting=stats.waiting + sum(each.waiting for each in own),
        )

    def audit(self) -> dict[str, int]:
        return self.engine.audit()

    def health(self) -> JsonObject:
        stats = self.stats()
        own = self.own_models.stats() if self.own_models is not None else []
        return {
            "status": "ok" if stats.alive and not self.draining else "stopping",
            "model": self._base.name,
            "fingerprint": self._base.fingerprint,
            **self._description,
            "resident": sorted(stats.references),
            "running": stats.running,
            "waiting": stats.waiting,
            "own_models": [_own_body(each) for each in own],
        }

    def close(self) -> None:
        """End what still runs, each stream with an error, and stop the engine."""
        self.draining = True
        self._residency.close()
        if self.own_models is not None:
            self.own_models.close()
        self.engine.close()


def _own_body(own: OwnModelStats) -> JsonObject:
    return {
        "digest": own.digest,
        "served": own.served,
        "bytes": own.n_bytes,
        "drift": own.drift,
        "running": own.running,
        "waiting": own.waiting,
    }
