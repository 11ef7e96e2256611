"""Metrics and the stream of a job over HTTP."""

import json
from typing import Any

from fastapi.testclient import TestClient

from models.db import Database
from models.registry import job_logs, job_runs
from tests.api.calls import expect
from tests.api.test_feed import end, write

URL = "/v1/fine_tuning/jobs"
NOT_FOUND = ("fine_tuning_job_id", "fine_tuning_job_not_found")


def parsed(text: str) -> list[tuple[str, str, Any]]:
    """Return (event, id, data) of a stream."""
    found = []
    for part in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in part.split("\n") if ": " in line)
        if "event" in fields:
            found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
    return found


def steps_of(told: list[tuple[str, str, Any]]) -> list[int]:
    return [point["step"] for name, _, data in told if name == "metrics" for point in data]


def test_metrics_come_in_order_and_after_a_step(
    client: TestClient, database: Database, job_id: str
) -> None:
    write(database, job_id, *range(1, 21))
    whole = client.get(f"{URL}/{job_id}/metrics").json()
    assert [point["step"] for point in whole["data"]] == list(range(1, 21))
    assert whole["n_points"] == 20
    rest = client.get(f"{URL}/{job_id}/metrics?after=18").json()
    assert [point["step"] for point in rest["data"]] == [19, 20]
    middle = client.get(f"{URL}/{job_id}/metrics?after=4&until=6").json()
    assert ([point["step"] for point in middle["data"]], middle["n_points"]) == ([5, 6], 2)
    expect(
        client.get(f"{URL}/ftjob-x/metrics"), 404, "fine_tuning_job_id", "fine_tuning_job_not_found"
    )


def test_a_long_run_is_thinned_out_but_for_its_end(
    client: TestClient, database: Database, job_id: str
) -> None:
    write(database, job_id, *range(1, 1001))
    thin = client.get(f"{URL}/{job_id}/metrics?max_points=50").json()
    steps = [point["step"] for point in thin["data"]]
    assert len(steps) <= 51
    assert (steps[-1], thin["n_points"]) == (1000, 1000)


def test_a_stream_goes_on_where_the_last_one_broke_off(
    client: TestClient, database: Database, job_id: str
) -> None:
    write(database, job_id, 1, 2, 3)
    end(database, job_id)
    answer = client.get(f"{URL}/{job_id}/stream")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    told = parsed(answer.text)
    assert [point["step"] for name, _, data in told if name == "metrics" for point in data] == [
        1,
        2,
        3,
    ]
    assert told[-1][0] == "end"
    assert {"event", "job"} <= {name for name, _, _ in told}
    last = told[-1][1]
    again = parsed(client.get(f"{URL}/{job_id}/stream", headers={"last-event-id": last}).text)
    assert "metrics" not in {name for name, _, _ in again}
    some = parsed(client.get(f"{URL}/{job_id}/stream?after=2").text)
    assert steps_of(some) == [3]


def test_a_bad_position_or_a_foreign_job_is_refused(client: TestClient, job_id: str) -> None:
    expect(client.get(f"{URL}/{job_id}/stream?after=x"), 400, "after", "invalid_value")
    expect(
        client.get(f"{URL}/ftjob-x/stream"), 404, "fine_tuning_job_id", "fine_tuning_job_not_found"
    )


def test_the_log_is_read_on_from_an_offset_until_the_job_has_ended(
    client: TestClient, database: Database, job_id: str
) -> None:
    url = f"{URL}/{job_id}/log"
    with database.write() as session:
        job_logs.append(session, job_id, 1, "one\ntwo\n", 1000)
    first = client.get(url).json()
    assert (first["text"], first["offset"], first["next_offset"]) == ("one\ntwo\n", 0, 8)
    assert (first["object"], first["has_more"], first["has_ended"]) == (
        "fine_tuning.job.log",
        False,
        False,
    )
    with database.write() as session:
        job_logs.append(session, job_id, 1, "three\n", 1000)
        job_runs.fail(session, job_id, 1, "x", "It failed.")
        job_runs.end_attempt(session, job_id, 1, "failed", 3)
    rest = client.get(url, params={"after": 8}).json()
    assert (rest["text"], rest["next_offset"], rest["has_ended"]) == ("three\n", 14, True)
    expect(client.get(url, params={"after": 15}), 400, "after", "invalid_value")
    expect(client.get(f"{URL}/ftjob-x/log"), 404, *NOT_FOUND)
