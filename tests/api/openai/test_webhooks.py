"""Webhooks over the API: what is registered, what is sent when a job ends, what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai import OpenAI

from models.db import Database
from models.settings import Settings, WebhookSettings
from models.webhook_sender import WebhookSender
from tests.api.calls import expect, new_job
from tests.webhook_receiver import LOCAL, Receiver, receiving
from worker.deliveries import deliver_due

ALLOWED = WebhookSettings(allowed_networks=[LOCAL])


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"webhooks": ALLOWED})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def add(client: TestClient, url: str, **fields: Any) -> Any:
    body = {"name": "mine", "url": url, "event_types": ["fine_tuning.job.cancelled"], **fields}
    return client.post("/v1/webhook_endpoints", json=body)


def test_the_end_of_a_job_is_told_as_the_sdk_verifies(
    client: TestClient, database: Database, receiver: Receiver
) -> None:
    made = add(client, receiver.url).json()
    job = new_job(client).json()["id"]
    client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert deliver_due(database, WebhookSender(ALLOWED), 60) == 1
    [(headers, body)] = receiver.received
    event = OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=made["signing_secret"])
    assert event.type == "fine_tuning.job.cancelled"
    assert event.data.id == job
    path = f"/v1/webhook_endpoints/{made['id']}/deliveries"
    [delivery] = client.get(path).json()["data"]
    assert (delivery["status"], delivery["event_id"]) == ("delivered", event.id)
    assert client.post(f"{path}/{delivery['id']}/retry").json()["status"] == "pending"
    assert deliver_due(database, WebhookSender(ALLOWED), 60) == 1
    assert receiver.received[1][1] == body
    expect(client.post(f"{path}/whd_x/retry"), 404, "delivery_id", "webhook_delivery_not_found")


def test_the_secret_is_shown_once_and_a_change_keeps_the_rest(client: TestClient) -> None:
    made = add(client, "https://example.com/a").json()
    path = f"/v1/webhook_endpoints/{made['id']}"
    shown = client.get(path).json()
    assert "signing_secret" not in shown
    assert made["signing_secret"].endswith(shown["signing_secret_hint"][-4:])
    changed = client.post(path, json={"name": "ours"}).json()
    assert (changed["name"], changed["url"]) == ("ours", "https://example.com/a")
    rotated = client.post(f"{path}/rotate_secret").json()
    assert rotated["signing_secret"] != made["signing_secret"]
    assert client.delete(path).json()["deleted"]
    expect(client.get(path), 404, "webhook_endpoint_id", "webhook_endpoint_not_found")


def test_a_test_event_goes_out_at_once(client: TestClient, receiver: Receiver) -> None:
    receiver.answers = [418]
    made = add(client, receiver.url).json()
    path = f"/v1/webhook_endpoints/{made['id']}/test"
    answer = client.post(path, json={"event_type": "batch.failed"}).json()
    assert (answer["status_code"], answer["event_type"]) == (418, "batch.failed")
    client.post(f"/v1/webhook_endpoints/{made['id']}", json={"url": "http://127.0.0.1:1/"})
    silent = client.post(path, json={"event_type": "batch.failed"})
    assert "ConnectError" in expect(silent, 422, "url", "webhook_not_delivered")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"url": "https://10.0.0.1/"}, "url"),
        ({"url": "nothing"}, "url"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["job.done"]}, "event_types[0]"),
        ({"name": ""}, "name"),
    ],
)
def test_what_is_refused_names_its_field(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    answer = add(client, **{"url": "https://example.com/", **fields})
    assert expect(answer, 400, param, "invalid_value")
