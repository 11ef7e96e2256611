"""What Prometheus is told, over HTTP; and that no adapter is ever named."""

import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest

from models.domain.generation import Chunk
from tests.worker.inference.conftest import TinyServer
from tests.worker.inference.test_server import (
    ENDLESS,
    ask,
    body,
    publish_adapter,
    text_of,
    wait_for,
)
from tests.worker.inference.tiny import Files, publish, shapes_of, tiny_llama
from worker.inference.engine.engine import BatchingEngine
from worker.inference.metrics import Metrics
from worker.inference.own_model import load_own_model
from worker.inference.own_models import Built, OwnModels


def values(client: httpx.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


def test_loads_hits_and_refusals_are_counted_by_tier_and_never_by_name(
    tiny_server: TinyServer, client: httpx.Client, tmp_path: Path
) -> None:
    metrics = Metrics()
    metrics.watch(tiny_server.engine.stats)
    tiny_server.service.metrics = metrics
    tiny_server.service._residency._metrics = metrics
    tiny_server.adapters._metrics = metrics
    shapes = shapes_of(tiny_llama(tiny_server.base.vocab_size))
    ref = publish(
        tiny_server.store,
        Files(shapes).write(tmp_path / "adapter"),
        tiny_server.base,
        template_sha256=tiny_server.renderer.template_sha256,
    )
    for _ in range(2):
        assert client.post("/generate", json=body(ref, max_tokens=3)).status_code == 200
    unknown = ref.model_copy(update={"digest": "a" * 40})
    assert client.post("/generate", json=body(unknown)).status_code == 404

    found = values(client)
    assert found['tunery_adapter_loads_total{result="ok",source="store"}'] == 1
    assert found['tunery_adapter_cache_hits_total{tier="host"}'] == 1
    assert found['tunery_adapter_resident{tier="host"}'] == 1
    assert found['tunery_adapter_resident{tier="slot"}'] == 1
    assert found['tunery_adapter_load_seconds_count{stage="fetch"}'] == 2
    assert found['tunery_adapter_load_seconds_count{stage="validate"}'] == 1
    assert found['tunery_adapter_reject_total{reason="model_not_found"}'] == 1
    assert found["tunery_adapter_references"] == 0
    assert found["tunery_generated_tokens_total"] == 6
    assert found["tunery_batch_distinct_adapters"] == 0
    text = client.get("/metrics").text
    assert ref.digest[:8] not in text
    assert ref.name not in text


def whole(answer: Sequence[object]) -> tuple[list[object], str]:
    """Return an answer whatever its pieces: who reads slowly gets several tokens in one."""
    chunks = [each for each in answer if isinstance(each, Chunk)]
    others: list[object] = [each for each in answer if not isinstance(each, Chunk)]
    return [*others, chunks[-1].finish_reason], "".join(each.text for each in chunks)


def test_the_metrics_are_behind_the_token(client: httpx.Client) -> None:
    assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_wanted_merged_answers_under_its_name_and_is_counted_beside_the_base(
    tiny_server: TinyServer, client: httpx.Client, tmp_path: Path
) -> None:
    tiny_llama(tiny_server.base.vocab_size).save_pretrained(tmp_path / "base")
    metrics, service = Metrics(), tiny_server.service

    def build(adapter: Path, served: str) -> Built:
        own = load_own_model(tmp_path / "base", adapter, served, precision="fp32", device="cpu")
        own.model.register_forward_pre_hook(lambda *_: time.sleep(0.005))
        decode = tiny_server.engine._decode
        return Built(BatchingEngine(own.model, decode, []), own.n_bytes, own.drift)

    template = tiny_server.renderer.template_sha256
    service.own_models = OwnModels(tiny_server.adapters, template, build, 1, metrics=metrics)
    metrics.watch_own(service.own_models.stats)
    service.metrics = metrics
    ref = publish_adapter(tiny_server, tmp_path, 1)
    merged = ref.model_copy(update={"merged": True})
    in_the_batch = ask(client, body(ref))
    assert client.get("/health").json()["own_models"] == []
    assert whole(ask(client, body(merged))) == whole(in_the_batch)  # name, fingerprint, text, usage
    (own,) = client.get("/health").json()["own_models"]
    assert 0 < own.pop("drift") < 1e-5
    assert own.pop("bytes") > 4 * 64 * tiny_server.base.vocab_size
    assert own == {"digest": ref.digest, "served": "merged", "running": 0, "waiting": 0}
    found = values(client)
    assert found['tunery_own_models{served="merged"}'] == 1
    assert found['tunery_own_models{served="own"}'] == 0
    assert found['tunery_own_model_loads_total{result="ok",served="merged"}'] == 1
    assert 0 < found["tunery_own_model_drift_max"] < 1e-5
    assert ref.digest[:8] not in client.get("/metrics").text
    with client.stream("POST", "/generate", json=body(merged, **ENDLESS)) as answer:
        assert answer.status_code == 200
        # So a server that is told to stop waits for it.
        assert service.stats().running == client.get("/health").json()["running"] == 1
        other = publish_adapter(tiny_server, tmp_path, 2).model_copy(update={"merged": True})
        assert client.post("/generate", json=body(other)).status_code == 429
    wait_for(lambda: service.stats().running == 0)
    assert text_of(ask(client, body(other)))
    assert [each["digest"] for each in client.get("/health").json()["own_models"]] == [other.digest]
    assert values(client)["tunery_own_model_evictions_total"] == 1
