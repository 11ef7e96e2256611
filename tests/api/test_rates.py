"""Rates of keys, counted in a real Valkey: OpenAI's headers, 429, and no limit without a broker."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.rates import RateLimits
from models.db import Database
from models.domain.access import Scope
from models.domain.limits import KeyRates, ProjectLimits
from models.registry import tenancy
from models.registry.usage import Used, User
from models.settings import BrokerSettings, Settings
from tests.api.calls import expect


@pytest.fixture
def limited(settings: Settings, database: Database, valkey_url: str) -> Iterator[TestClient]:
    """A client whose key may make 3 requests a minute, of a project that allows its keys 50."""
    with database.write() as session:
        project = tenancy.default_project(session)
        limits = ProjectLimits(requests_per_minute=50, tokens_per_minute=40)
        tenancy.set_limits(session, project, limits)
        rates = KeyRates(requests_per_minute=3)
        _, secret = tenancy.create_key(session, project.id, "slow", (Scope.ADMIN,), None, rates)
        _, other = tenancy.create_key(session, project.id, "other")
    broker = settings.broker.model_copy(update={"url": BrokerSettings(url=valkey_url).url})
    app = create_app(settings.model_copy(update={"broker": broker}))
    with TestClient(app, raise_server_exceptions=False) as client:
        client.headers["authorization"] = f"Bearer {secret}"
        client.headers["x-other"] = f"Bearer {other}"
        yield client


def test_a_key_that_asks_too_often_is_refused_with_openais_headers(limited: TestClient) -> None:
    first = limited.get("/v1/models")
    assert first.headers["x-ratelimit-limit-requests"] == "3"
    assert first.headers["x-ratelimit-remaining-requests"] == "2"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    for _ in range(2):
        assert limited.get("/v1/models").status_code == 200
    refused = limited.get("/v1/models")
    assert "3 requests a minute" in expect(refused, 429, None, "rate_limit_exceeded")
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    other = {"authorization": limited.headers["x-other"]}
    assert limited.get("/v1/models", headers=other).headers["x-ratelimit-limit-requests"] == "50"


def test_a_key_that_was_served_its_tokens_waits_for_the_next_minute(valkey_url: str) -> None:
    rates = RateLimits(BrokerSettings.model_validate({"url": valkey_url}))
    key = "key_tokens"
    assert rates.admit_tokens(key, 40).headers["x-ratelimit-remaining-tokens"] == "40"
    user = User("proj_x", key, "base")
    rates.spend([(user, Used(prompt_tokens=30, completion_tokens=20))])
    verdict = rates.admit_tokens(key, 40)
    assert verdict.refusal is not None
    assert verdict.headers["x-ratelimit-remaining-tokens"] == "0"
    assert rates.admit_tokens(key, None).headers == {}


def test_without_a_broker_nobody_is_limited(tmp_path: Path) -> None:
    nobody = f"redis+socket://{tmp_path / 'nobody.sock'}"
    rates = RateLimits(BrokerSettings.model_validate({"url": nobody}))
    for _ in range(3):
        verdict = rates.admit("key_x", 1)
        assert (verdict.headers, verdict.refusal) == ({}, None)
    assert rates.admit_tokens("key_x", 1).refusal is None
    rates.spend([(User("proj_x", "key_x", "base"), Used(prompt_tokens=3))])
