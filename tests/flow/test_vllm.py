"""A real vLLM behind the service: `make test-vllm`, which gives the path of its command.

The base model is SmolLM2 in float32, in which two engines agree on every token.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from models.domain.generation import AdapterRef, Chunk, Finished, Started, generate_event
from models.storage import open_store
from tests.worker.inference.conftest import running
from tests.worker.inference.test_process import settings_in
from tests.worker.inference.tiny import Files, publish
from worker.base_models import BaseModelInfo
from worker.inference.process import build_service
from worker.inference.service import InferenceService
from worker.inference.vllm.engine import VllmEngine

COMMAND = os.environ.get("TUNERY_TEST_VLLM_COMMAND", "")
MAX_RANK = 8

pytestmark = pytest.mark.skipif(
    not COMMAND, reason="needs an external vLLM: TUNERY_TEST_VLLM_COMMAND, see docs/vllm.md"
)


@dataclass(frozen=True)
class Real:
    """The same adapters behind vLLM and behind our own engine."""

    service: InferenceService
    vllm: httpx.Client
    own: httpx.Client
    refs: dict[str, AdapterRef]

    @property
    def engine(self) -> VllmEngine:
        assert isinstance(self.service.engine, VllmEngine)
        return self.service.engine


@pytest.fixture(scope="module")
def real(
    smollm2: tuple[Path, BaseModelInfo],
    base_model_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Real]:
    root = tmp_path_factory.mktemp("vllm")
    settings = settings_in(
        root,
        base_model_cache,
        engine="vllm",
        precision="fp32",
        vllm_command=COMMAND,
        vllm_max_lora_rank=MAX_RANK,
        vllm_arguments=["--max-model-len", "1024"],
        max_adapters=2,
    )
    own_settings = settings_in(root, base_model_cache, precision="fp32")
    service, info = build_service(settings)
    with running(service) as vllm:
        own_service, _ = build_service(own_settings)
        assert isinstance(service.engine, VllmEngine)
        shapes = service.engine._shapes
        template = service._renderer.template_sha256
        store = open_store(settings.storage)

        def put(name: str, **more: Any) -> AdapterRef:
            files = Files(shapes, size=0.15, **more)
            if name == "rs":
                files.config |= {"use_rslora": True, "alpha_pattern": {"v_proj": 3}}
            directory = files.write(root / name)
            return publish(store, directory, info, template_sha256=template)

        refs = {name: put(name, seed=n) for n, name in enumerate(["one", "two", "three", "rs"])}
        refs["large"] = put("large", r=2 * MAX_RANK)
        refs["larger"] = put("larger", r=2 * MAX_RANK, seed=9)
        with running(own_service) as own:
            yield Real(service, vllm, own, refs)


def ask(client: httpx.Client, ref: AdapterRef | None, **sampling: Any) -> httpx.Response:
    wanted = {"max_tokens": 12, "temperature": 0.0, **sampling}
    request: dict[str, Any] = {
        "request_id": "r",
        "base_model": "smollm2-135m-instruct",
        "adapter": ref.model_dump() if ref else None,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "json_schema": wanted.pop("json_schema", None),
        "sampling": wanted,
    }
    return client.post("/generate", json=request, timeout=300)


def answer(client: httpx.Client, ref: AdapterRef | None, **sampling: Any) -> tuple[str, Finished]:
    response = ask(client, ref, **sampling)
    assert response.status_code == 200, response.text
    events = [generate_event.validate_json(line) for line in response.text.splitlines()]
    started, *chunks, finished = events
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    return "".join(each.text for each in chunks if isinstance(each, Chunk)), finished


def test_base_and_adapters_answer_as_with_our_own_engine_and_change_places(real: Real) -> None:
    texts = {}
    for name in (None, "one", "two", "three", "rs", "one"):  # two slots: four change places
        ref = real.refs[name] if name else None
        text, finished = answer(real.vllm, ref)
        expected, own = answer(real.own, ref)
        assert text == expected
        assert finished.completion_tokens == own.completion_tokens
        assert finished.prompt_tokens == own.prompt_tokens
        texts[name] = text
    assert "Paris" in texts[None]
    assert len(set(texts.values())) == 5
    assert real.engine.stats().host_evictions == 3
    assert real.engine.audit() == {}


def test_streams_of_base_and_adapters_side_by_side_are_the_answers_alone(real: Real) -> None:
    refs = [None, real.refs["one"], real.refs["two"]]
    alone = [answer(real.own, ref)[0] for ref in refs]
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(lambda ref: answer(real.vllm, ref)[0], refs * 3))
    assert texts == alone * 3
    assert sum(real.engine.stats().references.values()) == 0


def test_what_vllm_cannot_serve_is_refused_and_never_answered_by_the_base(real: Real) -> None:
    response = ask(real.vllm, real.refs["large"])
    assert response.status_code == 422
    assert "rank 16, and vLLM was started for ranks up to 8" in response.json()["error"]["message"]
    limits = real.engine._limits
    real.engine._limits = replace(limits, max_rank=64)  # so that vLLM itself is asked
    response = ask(real.vllm, real.refs["larger"])
    real.engine._limits = limits
    assert response.status_code == 422
    assert "greater than max_lora_rank 8" in response.json()["error"]["message"]
    assert real.refs["larger"].digest not in real.engine.stats().references


def test_sampling_is_repeatable_and_stops_where_it_is_told(real: Real) -> None:
    ref = real.refs["one"]
    first = answer(real.vllm, ref, temperature=1.0, seed=7)[0]
    assert answer(real.vllm, ref, temperature=1.0, seed=7)[0] == first
    text, finished = answer(real.vllm, None, stop=["Paris"])
    assert text == answer(real.own, None, stop=["Paris"])[0]
    assert "Par" not in text
    assert finished.completion_tokens < 12


def test_log_probabilities_are_those_of_our_own_engine(real: Real) -> None:
    def scores(client: httpx.Client) -> list[Any]:
        response = ask(client, real.refs["two"], logprobs=3, max_tokens=6)
        events = [generate_event.validate_json(line) for line in response.text.splitlines()]
        return [
            each
            for event in events
            if isinstance(event, Chunk)
            for scored in event.logprobs
            for each in (scored.offset, scored.logprob, *(top.logprob for top in scored.top))
        ]

    assert scores(real.vllm) == pytest.approx(scores(real.own), abs=2e-3)


def test_a_schema_is_followed(real: Real) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    text, _ = answer(real.vllm, None, json_schema=schema, max_tokens=60)
    assert "".join(text.split()) in ('{"city":"Paris"}', '{"city":"Rome"}')


def test_a_vllm_that_is_killed_makes_the_server_unready(real: Real) -> None:
    assert real.vllm.get("/health").status_code == 200
    real.engine._process.stop()
    assert real.vllm.get("/health").status_code == 503
    assert ask(real.vllm, None).status_code == 503
