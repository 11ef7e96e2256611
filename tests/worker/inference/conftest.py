"""Fixtures of the inference tests: few threads, a base identity, an object store, servers."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from models.storage import LocalStore
from tests.worker.inference.tiny import ADAPTER_BYTES, tiny_llama
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.chat import ChatRenderer
from worker.inference.adapter_store import AdapterStore
from worker.inference.engine.engine import BatchingEngine
from worker.inference.engine.scheduler import Limits
from worker.inference.process import HttpThread
from worker.inference.residency import Residency
from worker.inference.service import InferenceService

TOKEN = "secret-of-the-tests"


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def base() -> BaseModelInfo:
    """The identity of a base model that a test makes up."""
    return BaseModelInfo(
        name="tiny",
        source="path:tiny",
        fingerprint="0123456789abcdef0123456789abcdef",
        config_sha256="c" * 64,
        weights_sha256="d" * 64,
        vocab_size=256,
        n_parameters=1,
        max_length=8192,
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects")


@contextmanager
def running(service: InferenceService) -> Iterator[httpx.Client]:
    """The service behind HTTP on a real port, and a client that knows the token."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        http = HttpThread(service, TOKEN, listener)
        http.start_and_wait()
        stack.callback(http.stop)
        stack.callback(service.close)
        yield stack.enter_context(
            httpx.Client(
                base_url=f"http://127.0.0.1:{listener.getsockname()[1]}",
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=60,
            )
        )


class TinyServer:
    """A server of a tiny random model that speaks through the first of SmolLM2's tokens."""

    def __init__(self, tokenizers: "Tokenizers", base: BaseModelInfo, root: Path) -> None:
        tokenizer, self.renderer = tokenizers
        self.base = base.model_copy(update={"vocab_size": len(tokenizer)})
        self.store = LocalStore(root / "objects")
        self.model = tiny_llama(len(tokenizer))
        self.engine = BatchingEngine(
            self.model,
            lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
            [],
            limits=Limits(n_slots=2, max_running=2, max_waiting=2, adapter_bytes=2 * ADAPTER_BYTES),
        )
        self.adapters = AdapterStore(self.store, root / "adapters", self.base)
        residency = Residency(self.engine, self.adapters, self.renderer.template_sha256)
        self.service = InferenceService(
            self.engine, self.renderer, residency, self.base, {"precision": "fp32", "device": "cpu"}
        )


Tokenizers = tuple[PreTrainedTokenizerBase, ChatRenderer]


@pytest.fixture(scope="session")
def tokenizers(small_tokenizer: Path) -> Tokenizers:
    """The first of SmolLM2's tokens for decoding, and a renderer with a tokenizer of its own."""
    return load_tokenizer(small_tokenizer), ChatRenderer(load_tokenizer(small_tokenizer))


@pytest.fixture
def tiny_server(tokenizers: Tokenizers, base: BaseModelInfo, tmp_path: Path) -> TinyServer:
    return TinyServer(tokenizers, base, tmp_path)


@pytest.fixture
def client(tiny_server: TinyServer) -> Iterator[httpx.Client]:
    with running(tiny_server.service) as client:
        yield client
