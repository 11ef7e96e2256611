"""A whole inference server: with the real model in NF4, and as a process from start to SIGTERM."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from sqlalchemy import select

from models.db import Database
from models.domain.generation import AdapterRef, Chunk, Finished, Started, generate_event
from models.errors import UnavailableError
from models.registry import base_models
from models.settings import (
    DatabaseSettings,
    InferenceSettings,
    ModelSettings,
    Settings,
    StorageSettings,
)
from models.storage import open_store
from models.tables import BaseModel, InferenceServer
from models.tables.base import Base
from tests.worker.inference.conftest import TOKEN, TinyServer, running
from tests.worker.inference.test_server import body, slow_down
from tests.worker.inference.tiny import Files, publish, tiny_llama
from worker.base_models import BaseModelInfo, dequantise_, load_model, load_tokenizer
from worker.inference import process
from worker.inference.engine import packed_linear
from worker.inference.engine.engine import BatchingEngine
from worker.inference.process import InferenceProcess, build_service, listen, stop_ids

REPOSITORY = Path(__file__).parents[3]


def settings_in(root: Path, cache: Path, **inference: Any) -> Settings:
    return Settings(
        database=DatabaseSettings(url=f"sqlite:///{root}/tunery.db"),
        storage=StorageSettings(url=f"file:{root}/objects"),
        models=ModelSettings(cache_dir=cache),
        inference=InferenceSettings(
            adapter_cache_dir=root / "adapters", device="cpu", token=TOKEN, **inference
        ),
    )


@pytest.fixture(scope="module")
def real(
    smollm2: tuple[Path, BaseModelInfo],
    base_model_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[httpx.Client, list[AdapterRef | None]]]:
    """SmolLM2 in NF4 over HTTP; the base (None) and two random adapters of visible size."""
    root = tmp_path_factory.mktemp("real")
    settings = settings_in(root, base_model_cache)
    # The numbers of the NF4 base in float32, in which an answer does not depend on its company.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_linear, "pack_", torch.nn.Module.float)
        service, info = build_service(settings)
    engine = service.engine
    assert isinstance(engine, BatchingEngine)
    template = service._renderer.template_sha256
    store = open_store(settings.storage)
    refs = [
        publish(
            store,
            Files(engine._runner.layers.shapes, seed=seed, size=0.1).write(root / str(seed)),
            info,
            template_sha256=template,
        )
        for seed in (1, 2)
    ]
    with running(service) as client:
        yield client, [None, *refs]


def ask_real(client: httpx.Client, ref: AdapterRef | None, question: str) -> str:
    request = {
        **body(ref, max_tokens=10),
        "base_model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": question}],
    }
    response = client.post("/generate", json=request)
    assert response.status_code == 200, response.text
    events = [generate_event.validate_json(line) for line in response.text.splitlines()]
    started, *chunks, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert (ref.digest[:12] if ref else "fp_") in started.system_fingerprint
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Chunk))


def test_eight_threads_get_the_answers_that_each_model_gives_alone(
    real: tuple[httpx.Client, list[AdapterRef | None]],
) -> None:
    client, refs = real
    questions = ["What is the capital of France?", "Name three colours."]
    cases = [(ref, question) for question in questions for ref in refs]
    alone = [ask_real(client, *case) for case in cases]
    assert "Paris" in alone[0]
    assert len(set(alone)) == len(cases)

    def alternate(offset: int) -> list[tuple[int, str]]:
        picks = [(offset + step * 5) % len(cases) for step in range(3)]
        return [(pick, ask_real(client, *cases[pick])) for pick in picks]

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for batch in pool.map(alternate, range(8)) for answer in batch]
    assert [text for _, text in answers] == [alone[pick] for pick, _ in answers]
    assert {pick for pick, _ in answers} == set(range(len(cases)))


def test_the_wrapped_nf4_base_answers_to_the_bit_like_the_plain_one(
    smollm2: tuple[Path, BaseModelInfo], real: tuple[httpx.Client, list[AdapterRef | None]]
) -> None:
    directory, _ = smollm2
    model: Any = load_model(directory, precision="nf4")
    dequantise_(model)
    torch.nn.Module.float(model)
    tokenizer = load_tokenizer(directory)
    messages = [{"role": "user", "content": "Say something in Japanese."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)
    expected = str(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    answer = ask_real(real[0], None, "Say something in Japanese.")
    assert answer == expected.rstrip("\ufffd")


def tiny_model_directory(root: Path, tokenizer_directory: Path) -> Path:
    tokenizer = load_tokenizer(tokenizer_directory)
    tiny_llama(len(tokenizer)).save_pretrained(root / "tiny")
    tokenizer.save_pretrained(root / "tiny")
    return root / "tiny"


def environment(root: Path, **more: str) -> dict[str, str]:
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("TUNERY_")},
        "TUNERY_DATABASE__URL": f"sqlite:///{root}/tunery.db",
        "TUNERY_STORAGE__URL": f"file:{root}/objects",
        "TUNERY_MODELS__CACHE_DIR": f"{root}/models",
        "TUNERY_MODELS__CATALOG": json.dumps({"tiny": f"path:{root}/tiny"}),
        "TUNERY_INFERENCE__MODEL": "tiny",
        "TUNERY_INFERENCE__PRECISION": "fp32",
        "TUNERY_INFERENCE__ADAPTER_CACHE_DIR": f"{root}/adapters",
        "TUNERY_INFERENCE__TOKEN": TOKEN,
        "OMP_NUM_THREADS": "2",
        **more,
    }


def start(env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "worker.inference"],
        cwd=REPOSITORY,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def test_what_a_start_computes_leaves_no_pool_of_threads_behind(
    smollm2: tuple[Path, BaseModelInfo],
    base_model_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builders = []

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            builders.append(threading.current_thread())
            return work(*given, **named)

        return run

    for name in ("materialise", "load_model", "BatchingEngine"):
        monkeypatch.setattr(process, name, watched(getattr(process, name)))
    service, _ = build_service(settings_in(tmp_path, base_model_cache))
    service.close()
    assert [builder.is_alive() for builder in builders] == [False] * 3


def test_a_process_announces_itself_answers_and_withdraws_at_sigterm(
    tmp_path: Path, smollm2: tuple[Path, BaseModelInfo]
) -> None:
    tiny_model_directory(tmp_path, smollm2[0])
    database = Database(DatabaseSettings(url=f"sqlite:///{tmp_path}/tunery.db"))
    Base.metadata.create_all(database.engine)
    with database.write() as session:
        base_models.sync_catalog(session, {"tiny": f"path:{tmp_path}/tiny"})

    def servers() -> list[InferenceServer]:
        with database.read() as session:
            return list(session.scalars(select(InferenceServer)))

    child = start(environment(tmp_path))
    try:
        wait_for(lambda: child.poll() is not None or len(servers()) == 1)
        assert child.poll() is None
        (server,) = servers()
        with database.read() as session:
            row = session.get_one(BaseModel, "tiny")
            assert row.fingerprint == server.base_fingerprint
        assert (server.base_model, server.precision) == ("tiny", "fp32")
        with httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60) as client:
            response = client.post(f"{server.url}/generate", json=body())
            assert response.status_code == 200
            assert '"finished"' in response.text.splitlines()[-1]
        child.send_signal(signal.SIGTERM)
        _, log = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 0
    assert servers() == []
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {"inference_ready", "inference_stopped"} <= {line["event"] for line in lines}
    assert TOKEN not in log
    database.close()


def test_a_process_without_a_token_does_not_start(tmp_path: Path) -> None:
    child = start(environment(tmp_path, TUNERY_INFERENCE__TOKEN=""))
    _, log = child.communicate(timeout=90)
    assert child.returncode == 2
    assert "TUNERY_INFERENCE__TOKEN" in log


def test_draining_waits_for_open_streams_and_then_ends_them(
    tiny_server: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow_down(tiny_server)
    monkeypatch.setattr(process, "DRAIN_SECONDS", 0.5)
    long = body(max_tokens=100_000, temperature=1.0, seed=1)
    with (
        running(tiny_server.service) as client,
        client.stream("POST", "/generate", json=long) as response,
        ThreadPoolExecutor(1) as pool,
    ):
        short = pool.submit(client.post, "/generate", json=body())
        wait_for(lambda: tiny_server.engine.stats().running == 2)
        process._drain(tiny_server.service)
        assert '"finished"' in short.result().text.splitlines()[-1]
        last = list(response.iter_lines())[-1]
        assert json.loads(last)["error"]["code"] == "server_shutting_down"


def test_a_signal_ends_a_loading_process_at_once_and_a_serving_one_in_order(tmp_path: Path) -> None:
    loading = InferenceProcess(settings_in(tmp_path, tmp_path))
    with pytest.raises(SystemExit) as caught:
        loading.on_signal(signal.SIGTERM, None)
    assert caught.value.code == 0
    serving = InferenceProcess(settings_in(tmp_path, tmp_path))
    serving.serving = True
    serving.on_signal(signal.SIGTERM, None)
    assert serving.stop.is_set()


def test_a_taken_port_is_a_clear_error_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=rf"{port}.*TUNERY_INFERENCE__PORT"):
            listen(InferenceSettings(port=port))


def test_a_wildcard_address_needs_a_url_to_announce() -> None:
    with pytest.raises(UnavailableError, match="TUNERY_INFERENCE__ADVERTISED_URL"):
        listen(InferenceSettings(host="0.0.0.0"))
    listener, url = listen(InferenceSettings(host="0.0.0.0", advertised_url="http://gpu-1:9"))
    assert url == "http://gpu-1:9"
    listener.close()


def test_the_announced_url_names_the_port_that_was_picked() -> None:
    listener, url = listen(InferenceSettings())
    assert url == f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()


def test_end_tokens_may_be_one_several_or_none() -> None:
    assert stop_ids(None) == frozenset()
    assert stop_ids(2) == {2}
    assert stop_ids([2, 7]) == {2, 7}
