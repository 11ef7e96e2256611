"""A key is remembered for a moment, and forgotten at once where it is revoked."""

import time

from fastapi.testclient import TestClient

from api.key_cache import KeyCache


def test_what_is_known_ends() -> None:
    cache: KeyCache[str] = KeyCache(0.05)
    assert cache.get("a") is None
    cache.put("a", "caller")
    assert cache.get("a") == "caller"
    time.sleep(0.06)
    assert cache.get("a") is None
    never: KeyCache[str] = KeyCache(0)
    never.put("a", "caller")
    assert never.get("a") is None


def test_a_key_that_is_revoked_over_the_api_ends_at_once(client: TestClient) -> None:
    made = client.post("/v1/api_keys", json={"name": "short"}).json()
    own = {"authorization": f"Bearer {made['value']}"}
    assert client.get("/v1/models", headers=own).status_code == 200
    client.delete(f"/v1/api_keys/{made['id']}")
    assert client.get("/v1/models", headers=own).status_code == 401
