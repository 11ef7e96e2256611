"""The life of an inference server: load, listen, announce, serve, drain, withdraw."""

import secrets
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread
from types import FrameType
from typing import TYPE_CHECKING

import structlog
import uvicorn
from sqlalchemy.exc import SQLAlchemyError

from models.db import Database
from models.errors import UnavailableError
from models.registry import base_models, inference_servers
from models.settings import InferenceSettings, Settings
from models.storage import open_store
from worker.base_models import (
    QUANTISED,
    BaseModelInfo,
    dequantise_,
    load_model,
    load_tokenizer,
    materialise,
    pick_device,
)
from worker.chat import ChatRenderer
from worker.heads import Head
from worker.inference.adapter_store import AdapterStore
from worker.inference.encoder_service import EncoderService
from worker.inference.encoders import EncoderEngine
from worker.inference.engine.engine import BatchingEngine, Engine
from worker.inference.engine.graphs import CudaRecord, Record
from worker.inference.engine.scheduler import Limits
from worker.inference.engine.seq2seq import Seq2SeqEngine
from worker.inference.engine.stream import Decode
from worker.inference.metrics import Metrics
from worker.inference.own_model import lighten_, load_own_model
from worker.inference.own_models import Build, Built, OwnModels
from worker.inference.previewer import Previewer
from worker.inference.residency import Residency
from worker.inference.seq2seq_service import Seq2SeqService
from worker.inference.server import create_app
from worker.inference.service import InferenceService
from worker.inference.vllm.build import build_vllm_engine, read_base, refuse_own_model
from worker.threads import in_passing_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEARTBEAT_SECONDS = 5.0
TTL_SECONDS = 15.0
DRAIN_SECONDS = 10.0
_CLOSE_SECONDS = 5
_WILDCARDS = {"", "0.0.0.0", "::"}

logger = structlog.get_logger(__name__)


class HttpThread(Thread):
    """uvicorn on a thread of its own: the main thread keeps the signals and the heartbeat."""

    def __init__(self, service: InferenceService, token: str, listener: socket.socket) -> None:
        super().__init__(name="http", daemon=True)
        config = uvicorn.Config(
            create_app(service, token),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener

    def run(self) -> None:
        self._server.run(sockets=[self._listener])

    def start_and_wait(self) -> None:
        """Return once connections are accepted; raises ``RuntimeError`` if that never happens."""
        self.start()
        while not self._server.started:
            if not self.is_alive():
                raise RuntimeError("The HTTP server did not start; the log tells why.")
            time.sleep(0.01)

    def stop(self) -> None:
        """Close the listener, let open streams end, and return."""
        self._server.should_exit = True
        self.join(2 * _CLOSE_SECONDS)


def build_service(settings: Settings) -> tuple[InferenceService, BaseModelInfo]:
    """Load the base model of the settings and put an engine and an adapter store around it."""
    mine = settings.inference
    store = open_store(settings.storage)
    directory, info = in_passing_thread(lambda: materialise(mine.model, settings.models, store))
    device = pick_device(mine.device)
    description = {"precision": mine.precision, "device": device}
    metrics = Metrics()
    adapters = AdapterStore(
        store,
        mine.adapter_cache_dir,
        info,
        budget_bytes=mine.adapter_disk_bytes,
        metrics=metrics,
    )
    family = info.shape.family if info.shape is not None else "decoder"
    if family == "encoder":
        encoder = EncoderEngine(
            directory,
            mine.precision,
            device,
            ChatRenderer(load_tokenizer(directory)),
            max_adapters=mine.max_adapters,
        )
        encoders = EncoderService(encoder, adapters, info, description)
        encoders.previewer = Previewer(store, directory, info)
        return encoders, info
    # Two tokenizers: the engine's thread decodes while another thread renders.
    renderer, tokenizer = ChatRenderer(load_tokenizer(directory)), load_tokenizer(directory)

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    build_own: Build
    if family == "decoder" and mine.engine == "vllm":
        shapes, ends = read_base(directory)
        engine: Engine = build_vllm_engine(
            mine, directory, info, shapes, decode, stop_ids(ends) | renderer.stop_ids
        )
        description["engine"] = "vllm"
        build_own = refuse_own_model
    else:
        engine, build_own = _own_engines(mine, directory, info, decode, renderer.stop_ids)
    metrics.watch(engine.stats)
    residency = Residency(engine, adapters, renderer.template_sha256, metrics=metrics)
    kind = Seq2SeqService if family == "encoder_decoder" else InferenceService
    service = kind(engine, renderer, residency, info, description)
    service.metrics = metrics
    service.previewer = Previewer(store, directory, info)
    service.own_models = OwnModels(
        adapters,
        renderer.template_sha256,
        build_own,
        mine.max_own_models,
        batches=family == "decoder",
        metrics=metrics,
    )
    metrics.watch_own(service.own_models.stats)
    return service, info


def _own_engines(
    mine: InferenceSettings,
    directory: Path,
    info: BaseModelInfo,
    decode: Decode,
    turn_ends: frozenset[int],
) -> tuple[Engine, Build]:
    """Return our own engine around the base model, and what makes one of a base and an adapter."""
    family = info.shape.family if info.shape is not None else "decoder"
    device = pick_device(mine.device)
    head = Head("seq2seq_lm" if family == "encoder_decoder" else "causal_lm")

    def load() -> "PreTrainedModel":
        model = load_model(directory, precision=mine.precision, device=device, head=head)
        if device == "cpu" and mine.precision in QUANTISED:
            dequantise_(model)
        lighten_(model, mine.precision, device)
        return model

    def build_engine(
        model: "PreTrainedModel", fingerprint: str, record: Record | None = None
    ) -> Engine:
        ends = stop_ids(model.generation_config.eos_token_id) | turn_ends
        if family == "encoder_decoder":
            return Seq2SeqEngine(model, decode, ends, max_waiting=mine.max_waiting)
        return BatchingEngine(
            model,
            decode,
            ends,
            fingerprint=fingerprint,
            limits=Limits(
                max_running=mine.max_running,
                n_slots=mine.max_adapters,
                max_waiting=mine.max_waiting,
                cache_tokens=mine.cache_tokens,
                prefix_tokens=mine.prefix_tokens,
                adapter_bytes=mine.adapter_memory_bytes,
            ),
            record=record,
        )

    def build_own(adapter: Path, served: str) -> Built:
        own = load_own_model(
            directory, adapter, served, precision=mine.precision, device=device, head=head
        )
        engine = build_engine(own.model, f"{info.fingerprint} {adapter.name}")
        return Built(engine, own.n_bytes, own.drift)

    def build_own_in_passing(adapter: Path, served: str) -> Built:
        return in_passing_thread(lambda: build_own(adapter, served))

    # Models of their own decide in Python what a pass is: only the base's is always the same.
    record = CudaRecord(device) if device != "cpu" and mine.cuda_graphs else None
    engine = in_passing_thread(lambda: build_engine(load(), info.fingerprint, record))
    return engine, build_own_in_passing


def stop_ids(eos_token_id: int | list[int] | None) -> frozenset[int]:
    """Return the end tokens of a generation configuration, which may name one, several or none."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def listen(settings: InferenceSettings) -> tuple[socket.socket, str]:
    """Bind the port, without accepting yet, and return the socket and the URL to announce.

    Raises:
        UnavailableError: the port is taken, or the address has no name that others could use.
    """
    if settings.advertised_url is None and settings.host in _WILDCARDS:
        raise UnavailableError(
            f"The inference server listens on {settings.host!r}, no address to connect to. "
            "Set TUNERY_INFERENCE__ADVERTISED_URL to the URL under which the API reaches it."
        )
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise UnavailableError(
            f"The inference server cannot listen on {settings.host}:{settings.port}: "
            f"{error.strerror}. Change TUNERY_INFERENCE__HOST or TUNERY_INFERENCE__PORT."
        ) from error
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    url = settings.advertised_url or f"http://{host}:{listener.getsockname()[1]}"
    return listener, url


class InferenceProcess:
    """One inference server from start to end.

    A signal ends it at once as long as it only loads, and in order when it serves.
    """

    def __init__(self, settings: Settings) -> None:
        self.stop = Event()
        self.serving = False
        self._settings = settings
        self._database = Database(settings.database)
        self._server_id = f"inference-{secrets.token_hex(8)}"

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; return the exit status, 0 after an orderly stop.

        The settings hold a token: ``python -m worker.inference`` has looked before all was loaded.
        """
        token = self._settings.inference.token.get_secret_value()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        listener, url = listen(self._settings.inference)
        service, info = build_service(self._settings)
        http = HttpThread(service, token, listener)
        http.start_and_wait()
        self.serving = True
        with self._database.write() as session:
            base_models.record_identity(session, info)
        self._announce(info, url)
        logger.info("inference_ready", url=url, model=info.name, fingerprint=info.fingerprint)
        try:
            return self._serve(service, http, info, url)
        finally:
            self._withdraw()
            _drain(service)
            http.stop()
            self._database.close()
            logger.info("inference_stopped", url=url)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Take SIGTERM or SIGINT on the main thread."""
        self.stop.set()
        if not self.serving:
            raise SystemExit(0)  # nobody knows of this process yet: nothing is to be put in order

    def _serve(
        self, service: InferenceService, http: HttpThread, info: BaseModelInfo, url: str
    ) -> int:
        while not self.stop.wait(HEARTBEAT_SECONDS):
            if not http.is_alive() or not service.stats().alive:
                logger.error("inference_broken", http=http.is_alive())
                return 1
            if lost := service.audit():
                logger.error("adapter_leases_lost", lost=lost)
            try:
                self._announce(info, url)
            except SQLAlchemyError:
                # The lease outlives two missed heartbeats, and answering needs no database.
                logger.warning("heartbeat_failed", exc_info=True)
        return 0

    def _announce(self, info: BaseModelInfo, url: str) -> None:
        with self._database.write() as session:
            server = inference_servers.Announcement(
                server_id=self._server_id,
                base_model=info.name,
                base_fingerprint=info.fingerprint,
                precision=self._settings.inference.precision,
                url=url,
            )
            inference_servers.announce(session, server, TTL_SECONDS)

    def _withdraw(self) -> None:
        try:
            with self._database.write() as session:
                inference_servers.withdraw(session, self._server_id)
        except SQLAlchemyError:
            logger.warning("withdraw_failed", exc_info=True)  # the lease runs out by itself


def _drain(service: InferenceService) -> None:
    """Admit nothing more, let streams end for `DRAIN_SECONDS`, then end the rest with an error."""
    service.draining = True
    deadline = time.monotonic() + DRAIN_SECONDS
    while time.monotonic() < deadline:
        stats = service.stats()
        if not stats.alive or stats.running + stats.waiting == 0:
            break
        time.sleep(0.05)
    service.close()
