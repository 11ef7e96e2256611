"""Pages of a service in use for long: their bytes and their queries do not grow with it."""

from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine, event

from api.app import create_app
from api.cli.migrate import upgrade
from bench import page as bench
from models.db import Database

MOST_BYTES = 60_000
"""Of a page, compressed; its files, which a browser keeps, are measured in tests/web."""
MOST_QUERIES = 20


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, bench.Large]]:
    """10,000 jobs and adapters, one job of 100,000 steps, data sets of 1 GB."""
    settings = bench.settings_in(tmp_path_factory.mktemp("large"))
    upgrade(settings.database.url)
    database = Database(settings.database)
    made = bench.fill(database)
    database.close()
    with TestClient(create_app(settings)) as client:
        bench.log_in(client, made.key)
        yield client, made


def test_no_page_is_large_or_asks_much(
    large: tuple[TestClient, bench.Large],
) -> None:
    client, made = large
    asked: list[str] = []

    def count(*arguments: object) -> None:
        asked.append(str(arguments[2]))

    event.listen(Engine, "before_cursor_execute", count)
    try:
        for path in made.paths:
            asked.clear()
            answer = client.get(path)
            assert answer.status_code == 200, path
            assert int(answer.headers["content-length"]) <= MOST_BYTES, path
            assert len(asked) <= MOST_QUERIES, (path, asked)
    finally:
        event.remove(Engine, "before_cursor_execute", count)


def test_a_list_is_found_in_sorted_and_gone_through_page_by_page(
    large: tuple[TestClient, bench.Large],
) -> None:
    client, made = large
    found = client.get("/v1/fine_tuning/jobs?q=desk-77&limit=100").json()
    expected = [f"desk-{at}" for at in range(bench.N_JOBS) if f"desk-{at}".startswith("desk-77")]
    assert {each["user_provided_suffix"] for each in found["data"]} <= set(expected)
    assert len(found["data"]) == 100
    oldest = client.get("/v1/fine_tuning/jobs?order=asc&limit=1").json()["data"][0]
    assert oldest["user_provided_suffix"] == "desk-0"
    (running,) = client.get("/v1/fine_tuning/jobs?status=running").json()["data"]
    assert running["id"] == made.job_id
    # What stands for other texts in SQL stands for itself.
    assert client.get("/v1/fine_tuning/jobs?q=%25").json()["data"] == []
    assert client.get("/v1/files?q=tickets-7.&limit=5").json()["data"][0]["filename"].endswith("l")
    first = client.get("/v1/files?sort=filename&order=asc&limit=1").json()["data"][0]
    assert first["filename"] == "tickets-0.jsonl"
    text = client.get("/ui/jobs?q=desk-77&status=succeeded&sort=created_at&order=asc").text
    assert 'data-job="ftjob-000000000000000000000077"' in text
    assert "status=succeeded" in text.partition('class="more"')[2]
