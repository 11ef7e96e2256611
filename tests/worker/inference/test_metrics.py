"""What Prometheus is told, over HTTP; and that no adapter is ever named."""

from pathlib import Path

import httpx

from tests.worker.inference.conftest import TinyServer
from tests.worker.inference.test_server import body
from tests.worker.inference.tiny import Files, publish, shapes_of, tiny_llama
from worker.inference.metrics import Metrics


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


def test_the_metrics_are_behind_the_token(client: httpx.Client) -> None:
    assert client.get("/metrics", headers={"Authorization": "Bearer wrong"}).status_code == 401
