"""The inference server over real HTTP, with a tiny random model."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest

from models.domain.generation import (
    AdapterRef,
    Chunk,
    Failed,
    Finished,
    GenerateEvent,
    Started,
    generate_event,
)
from tests.worker.inference.conftest import TinyServer, running
from tests.worker.inference.tiny import Files, publish, shapes_of, tiny_llama
from worker.inference.server import create_app

SHAPES = shapes_of(tiny_llama())


def body(adapter: AdapterRef | None = None, **sampling: Any) -> dict[str, Any]:
    return {
        "request_id": "req-1",
        "base_model": "tiny",
        "adapter": adapter.model_dump() if adapter else None,
        "messages": [{"role": "user", "content": "Hello"}],
        "sampling": {"max_tokens": 8, "temperature": 0, **sampling},
    }


ENDLESS: dict[str, Any] = {"max_tokens": 100_000, "temperature": 1.0, "seed": 1}


def events_of(lines: Iterator[str]) -> list[GenerateEvent]:
    return [generate_event.validate_json(line) for line in lines]


def ask(client: httpx.Client, request: dict[str, Any]) -> list[GenerateEvent]:
    response = client.post("/generate", json=request)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return events_of(iter(response.text.splitlines()))


def text_of(events: list[GenerateEvent], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Chunk) and e.index == index)


def refusal(client: httpx.Client, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    response = client.post("/generate", json=request)
    return response.status_code, response.json()["error"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def is_idle(server: TinyServer) -> bool:
    stats = server.engine.stats()
    return stats.running + stats.waiting == 0 and not any(stats.references.values())


def slow_down(server: TinyServer, seconds: float = 0.01) -> None:
    server.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))


@pytest.fixture
def adapter(tiny_server: TinyServer, tmp_path: Path) -> AdapterRef:
    return publish_adapter(tiny_server, tmp_path, 1)


def publish_adapter(server: TinyServer, root: Path, seed: int) -> AdapterRef:
    directory = Files(SHAPES, seed=seed, size=0.4).write(root / f"adapter-{seed}")
    template = server.renderer.template_sha256
    return publish(server.store, directory, server.base, template_sha256=template)


def test_an_answer_is_started_chunks_finished(
    client: httpx.Client, tiny_server: TinyServer
) -> None:
    events = ask(client, body())
    started, *chunks, finished = events
    assert isinstance(started, Started)
    assert started.system_fingerprint == f"fp_{tiny_server.base.fingerprint[:12]}"
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks if isinstance(chunk, Chunk)][-1] == "length"
    assert finished == Finished(prompt_tokens=started.prompt_tokens, completion_tokens=8)
    assert text_of(events)


def test_an_adapter_changes_the_answer_and_is_named_in_the_fingerprint(
    client: httpx.Client, tiny_server: TinyServer, adapter: AdapterRef
) -> None:
    events = ask(client, body(adapter))
    assert isinstance(events[0], Started)
    base = tiny_server.base.fingerprint[:12]
    assert events[0].system_fingerprint == f"fp_{base}_{adapter.digest[:12]}"
    assert text_of(events) != text_of(ask(client, body()))
    wait_for(lambda: is_idle(tiny_server))


def test_choices_are_told_apart_and_repeat_with_their_seed(client: httpx.Client) -> None:
    request = body(n=2, temperature=1.0, seed=3)
    first, second = ask(client, request), ask(client, request)
    assert [text_of(first, i) for i in range(2)] == [text_of(second, i) for i in range(2)]
    assert text_of(first, 0) != text_of(first, 1)
    assert isinstance(first[-1], Finished)
    assert first[-1].completion_tokens == 16


def test_an_unknown_adapter_is_404_and_never_the_base(
    client: httpx.Client, adapter: AdapterRef
) -> None:
    unknown = adapter.model_copy(update={"digest": "0" * 40})
    status, error = refusal(client, body(unknown))
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_an_adapter_of_another_base_is_409_naming_both(
    client: httpx.Client, adapter: AdapterRef, tiny_server: TinyServer
) -> None:
    foreign = adapter.model_copy(update={"base_fingerprint": "f" * 32})
    status, error = refusal(client, body(foreign))
    assert (status, error["code"]) == (409, "wrong_base_model")
    assert "f" * 32 in error["message"]
    assert tiny_server.base.fingerprint in error["message"]


def test_a_request_for_another_base_model_is_409(client: httpx.Client) -> None:
    status, error = refusal(client, {**body(), "base_model": "other"})
    assert (status, error["code"]) == (409, "wrong_base_model")


def test_an_adapter_that_does_not_load_is_422_with_the_reason(
    client: httpx.Client, tiny_server: TinyServer, tmp_path: Path
) -> None:
    files = Files(SHAPES)
    key = next(iter(files.tensors))
    files.tensors[key] = files.tensors[key][:, :-1].contiguous()
    directory = files.write(tmp_path / "bad")
    template = tiny_server.renderer.template_sha256
    ref = publish(tiny_server.store, directory, tiny_server.base, template_sha256=template)
    status, error = refusal(client, body(ref))
    assert (status, error["code"]) == (422, "invalid_adapter")
    assert "shape_mismatch" in error["message"]


def test_adapters_beyond_what_can_be_held_are_429(
    client: httpx.Client, tiny_server: TinyServer, tmp_path: Path
) -> None:
    slow_down(tiny_server)
    refs = [publish_adapter(tiny_server, tmp_path, seed) for seed in range(3)]
    with (
        client.stream("POST", "/generate", json=body(refs[0], **ENDLESS)) as first,
        client.stream("POST", "/generate", json=body(refs[1], **ENDLESS)) as second,
    ):
        assert (first.status_code, second.status_code) == (200, 200)
        response = client.post("/generate", json=body(refs[2]))
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "adapter_capacity"
    wait_for(lambda: is_idle(tiny_server))
    assert text_of(ask(client, body(refs[2])))


def test_requests_beyond_what_may_wait_are_429_with_retry_after(
    client: httpx.Client, tiny_server: TinyServer
) -> None:
    slow_down(tiny_server)
    with client.stream("POST", "/generate", json=body(n=4, **ENDLESS)) as full:
        assert full.status_code == 200
        response = client.post("/generate", json=body())
        assert (response.status_code, response.headers["retry-after"]) == (429, "2")
        assert response.json()["error"]["code"] == "rate_limit_exceeded"
    wait_for(lambda: is_idle(tiny_server))


def test_a_client_that_leaves_frees_its_sequence_and_adapter(
    client: httpx.Client, tiny_server: TinyServer, adapter: AdapterRef
) -> None:
    slow_down(tiny_server)
    with client.stream("POST", "/generate", json=body(adapter, **ENDLESS, n=2)) as response:
        lines = response.iter_lines()  # held: once it is gone the client has left
        next(lines)
        assert tiny_server.engine.stats().references[adapter.digest] > 0
    wait_for(lambda: is_idle(tiny_server))
    assert tiny_server.engine.stats().references == {adapter.digest: 0}


def test_a_client_that_leaves_before_the_first_token_frees_its_place(
    client: httpx.Client, tiny_server: TinyServer, adapter: AdapterRef
) -> None:
    slow_down(tiny_server, 0.5)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json=body(adapter, **ENDLESS), timeout=0.2)
    wait_for(lambda: is_idle(tiny_server))


def test_an_error_in_mid_stream_is_a_failed_event(
    client: httpx.Client, tiny_server: TinyServer, adapter: AdapterRef
) -> None:
    steps = iter(range(100))

    def break_at_the_fifth(*_: object) -> None:
        if next(steps) == 4:
            raise RuntimeError("secret detail")

    tiny_server.model.register_forward_pre_hook(break_at_the_fifth)
    started, *chunks, failed = ask(client, body(adapter))
    assert isinstance(started, Started)
    assert chunks
    assert isinstance(failed, Failed)
    assert (failed.error["status"], failed.error["code"]) == (500, "generation_failed")
    assert "secret detail" not in failed.error["message"]
    wait_for(lambda: is_idle(tiny_server))
    assert isinstance(ask(client, body(adapter))[-1], Finished)


def test_an_error_before_the_first_token_has_a_status(
    client: httpx.Client, tiny_server: TinyServer
) -> None:
    def spoil(*_: object) -> None:
        raise RuntimeError("secret detail")

    tiny_server.model.register_forward_pre_hook(spoil)
    status, error = refusal(client, body())
    assert (status, error["code"]) == (500, "generation_failed")


def test_a_server_that_stops_ends_open_streams_with_an_error(tiny_server: TinyServer) -> None:
    slow_down(tiny_server)
    with (
        running(tiny_server.service) as client,
        client.stream("POST", "/generate", json=body(**ENDLESS)) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        closing = Thread(target=tiny_server.service.close)
        closing.start()
        last = events_of(lines)[-1]
        closing.join()
        assert isinstance(last, Failed)
        assert (last.error["status"], last.error["code"]) == (503, "server_shutting_down")
        status, error = refusal(client, body())
        assert (status, error["code"], error["retry_after"]) == (503, "server_shutting_down", 5)
        assert client.get("/health").status_code == 503


def test_a_prompt_that_does_not_fit_is_refused_and_an_answer_is_cut_to_what_fits(
    client: httpx.Client, tiny_server: TinyServer
) -> None:
    started = ask(client, body())[0]
    assert isinstance(started, Started)
    limit = started.prompt_tokens
    object.__setattr__(tiny_server.base, "max_length", limit + 3)
    finished = ask(client, body(max_tokens=None))[-1]
    assert isinstance(finished, Finished)
    assert finished.completion_tokens == 3
    object.__setattr__(tiny_server.base, "max_length", limit)
    status, error = refusal(client, body())
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert str(limit) in error["message"]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"messages": "hi"}, "messages"),
        ({"surprise": 1}, "surprise"),
        ({"sampling": {"top_p": 0}}, "sampling.top_p"),
        ({"sampling": {"stop": [""]}}, "stop"),
    ],
)
def test_a_malformed_request_is_400_and_names_the_field(
    client: httpx.Client, change: dict[str, Any], where: str
) -> None:
    status, error = refusal(client, {**body(), **change})
    assert (status, error["param"]) == (400, where)


def test_warming_makes_an_adapter_resident_without_holding_it(
    client: httpx.Client, tiny_server: TinyServer, adapter: AdapterRef
) -> None:
    response = client.post("/warm", json=adapter.model_dump())
    assert response.json() == {"digest": adapter.digest, "resident": True}
    assert tiny_server.engine.stats().references == {adapter.digest: 0}
    unknown = adapter.model_copy(update={"digest": "0" * 40})
    assert client.post("/warm", json=unknown.model_dump()).status_code == 404


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "secret-of-the-tests", "é"])
def test_without_the_token_nothing_but_health_answers(
    client: httpx.Client, header: str | None
) -> None:
    headers = {b"authorization": header.encode()} if header else {}
    with httpx.Client(base_url=client.base_url, headers=headers) as stranger:
        for path in ("/generate", "/warm", "/nowhere"):
            response = stranger.post(path, content=b"{}")
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert stranger.get("/health").status_code == 200


def test_an_empty_token_is_no_token(tiny_server: TinyServer) -> None:
    with pytest.raises(ValueError, match="token"):
        create_app(tiny_server.service, "")
    tiny_server.service.close()


def test_health_tells_what_the_server_holds_and_does(
    client: httpx.Client, tiny_server: TinyServer, adapter: AdapterRef
) -> None:
    client.post("/warm", json=adapter.model_dump())
    assert client.get("/health").json() == {
        "status": "ok",
        "model": "tiny",
        "fingerprint": tiny_server.base.fingerprint,
        "precision": "fp32",
        "device": "cpu",
        "resident": [adapter.digest],
        "running": 0,
        "waiting": 0,
        "own_models": [],
    }
