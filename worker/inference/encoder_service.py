"""What an inference server of an encoder does, without HTTP: check a request and answer it."""

import asyncio
from typing import NoReturn

from models.domain.base import JsonObject
from models.domain.encoding import EncodeAnswer, EncodeRequest
from models.domain.generation import AdapterRef, GenerateRequest
from models.errors import ConflictError, InvalidRequestError, UnprocessableError
from worker.base_models import BaseModelInfo
from worker.inference.adapter_store import AdapterStore
from worker.inference.answer import shutting_down
from worker.inference.encoders import EncoderEngine
from worker.inference.engine.params import EngineStats
from worker.inference.service import InferenceService


class EncoderService(InferenceService):
    """One encoder and its adapters.

    Args:
        encoder: What answers.
        adapters: Where adapters come from.
        base: The base model that `encoder` holds.
        description: What else `health` tells: ``precision`` and ``device``.
    """

    def __init__(
        self,
        encoder: EncoderEngine,
        adapters: AdapterStore,
        base: BaseModelInfo,
        description: dict[str, str],
    ) -> None:
        self.draining = False
        self.previewer = None
        self._encoder = encoder
        self._adapters = adapters
        self._base = base
        self._description = description

    def answer(self, request: GenerateRequest) -> NoReturn:
        """Refuse: an encoder reads text and writes none."""
        raise InvalidRequestError(
            f"{self._base.name!r} is an encoder and writes no text. Ask it at /v1/embeddings, "
            "/v1/fill_mask or /v1/classify.",
            param="model",
            code="wrong_kind_of_model",
        )

    async def encode(self, request: EncodeRequest) -> EncodeAnswer:
        """Answer a request; raises what ``EncoderEngine.run`` and ``AdapterStore.open`` do."""
        if self.draining:
            raise shutting_down()
        if request.base_model != self._base.name:
            raise ConflictError(
                f"This server holds base model {self._base.name!r}, not {request.base_model!r}.",
                param="model",
                code="wrong_base_model",
            )
        if request.adapter is not None and request.adapter.merged:
            raise UnprocessableError(
                f"{request.adapter.name!r} is wanted merged, which encoders do not serve. Have it "
                "answered unmerged.",
                param="model",
                code="not_mergeable",
            )
        results, n_tokens = await asyncio.to_thread(self._run, request)
        return EncodeAnswer(
            results=results,
            prompt_tokens=n_tokens,
            system_fingerprint=self.system_fingerprint(request.adapter),
        )

    def _run(self, request: EncodeRequest) -> tuple[list[JsonObject], int]:
        if request.adapter is None:
            return self._encoder.run(request)
        with self._adapters.open(request.adapter) as (directory, manifest):
            return self._encoder.run(request, directory, manifest)

    async def warm(self, adapter: AdapterRef) -> None:
        """Fetch an adapter; the first request that names it brings it into memory."""

        def fetch() -> None:
            with self._adapters.open(adapter):
                pass

        await asyncio.to_thread(fetch)

    def audit(self) -> dict[str, int]:
        """Return the adapters whose leases were lost: none, since an encoder lends none."""
        return {}

    def stats(self) -> EngineStats:
        return EngineStats(alive=True, running=self._encoder.running, waiting=0)

    def health(self) -> JsonObject:
        return {
            "status": "stopping" if self.draining else "ok",
            "model": self._base.name,
            "fingerprint": self._base.fingerprint,
            **self._description,
            "resident": [],
            "running": self._encoder.running,
            "waiting": 0,
            "own_models": [],
        }

    def close(self) -> None:
        """Take no more requests; those in progress end by themselves."""
        self.draining = True
