"""The application on a real port: what only a socket shows, and the unchanged `openai` SDK."""

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
import pytest
from openai import OpenAI

from api.app import create_app
from models.db import Database
from models.domain.generation import Chunk, Failed
from models.domain.reports import DatasetReport, RowFinding
from models.errors import CapacityError
from models.registry import files, inference_servers, tenancy
from models.registry.inference_servers import Announcement
from models.settings import Settings
from tests.api.calls import ROW
from tests.api.fake_inference import HELLO, STARTED, Cut, FakeInference, Hold, running_fake, serving

LEAVE_SECONDS = 2
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def port(settings: Settings, database: Database) -> Iterator[tuple[str, str]]:
    """The URL of a running API and a key for it."""
    with database.write() as session:
        project = tenancy.default_project(session)
        _, secret = tenancy.create_key(session, project.id, "test")
    with serving(create_app(settings), lifespan="on") as url:
        yield url, secret


@pytest.fixture
def fake(port: tuple[str, str], database: Database) -> Iterator[FakeInference]:
    with running_fake() as made:
        with database.write() as session:
            server = Announcement("fake-1", "base", "f" * 64, "nf4", made.url)
            inference_servers.announce(session, server, 60)
        yield made


@pytest.fixture
def sdk(port: tuple[str, str]) -> Iterator[OpenAI]:
    url, secret = port
    with OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=20) as client:
        yield client


def begin_chat(port: tuple[str, str], stream: bool) -> socket.socket:
    """Send a chat request by hand; return the connection, which the test closes when it likes."""
    url, secret = port
    body = json.dumps({"model": "base", "messages": MESSAGES, "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=10)
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("events", [[], [STARTED], HELLO[:2]], ids=["queued", "prefill", "writing"])
def test_a_client_that_leaves_ends_the_work_for_it(
    port: tuple[str, str], fake: FakeInference, stream: bool, events: list[Any]
) -> None:
    fake.events = [*events, Hold()]
    connection = begin_chat(port, stream)
    assert fake.holding.wait(10)
    assert not fake.left.is_set()
    connection.close()
    assert fake.left.wait(LEAVE_SECONDS)


def test_a_chunked_body_over_the_limit_is_413(port: tuple[str, str]) -> None:
    url, secret = port

    def body() -> Iterator[bytes]:
        yield b"--x\r\nContent-Disposition: form-data; name=file; filename=f\r\n\r\n"
        for _ in range(20):
            yield b"a" * 10_000

    headers = {
        "authorization": f"Bearer {secret}",
        "content-type": "multipart/form-data; boundary=x",
    }
    response = httpx2.post(f"{url}/v1/files", content=body(), headers=headers)
    assert response.status_code == 413, response.text
    assert response.json()["error"]["code"] == "file_too_large"
    assert response.headers["x-request-id"]
    assert httpx2.get(f"{url}/v1/files", headers=headers).json()["data"] == []


def test_the_sdk_raises_its_own_classes_with_our_words(sdk: OpenAI, fake: FakeInference) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.models.retrieve("ft:org/base:local::nothing1")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as bad:
        sdk.fine_tuning.jobs.create(model="base", training_file="f", suffix="a b")
    assert bad.value.param == "suffix"
    fake.refuse(CapacityError("Full.", retry_after=1))
    with pytest.raises(openai.RateLimitError):
        sdk.chat.completions.create(model="base", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="nonsense").models.list()


@pytest.mark.parametrize("last", [Cut(), Failed(error=CapacityError("No memory.").to_dict())])
def test_a_broken_stream_raises_in_the_sdk(sdk: OpenAI, fake: FakeInference, last: object) -> None:
    fake.events = [*HELLO[:2], last]
    seen = []
    with pytest.raises(openai.APIError) as raised:  # noqa: PT012
        for chunk in sdk.chat.completions.create(model="base", messages=MESSAGES, stream=True):
            seen.append(chunk.choices[0].delta.content)
    assert seen == ["", "Hel"]
    assert raised.value.code


def test_the_sdk_reads_any_text_and_ends(sdk: OpenAI, fake: FakeInference) -> None:
    text = "a\u2028b\x85\r\n\n\x0bdata: [DONE]\n\n\N{GRINNING FACE}"
    fake.events = [STARTED, Chunk(text=text), *HELLO[3:]]
    plain = sdk.chat.completions.create(model="base", messages=MESSAGES, seed=None, stop=None)
    assert plain.choices[0].message.content == text
    stream = sdk.chat.completions.create(model="base", messages=MESSAGES, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text


def test_the_loops_of_the_sdk_over_lists_end(sdk: OpenAI) -> None:
    made = [sdk.files.create(file=("a.jsonl", ROW), purpose="fine-tune").id for _ in range(5)]
    assert [file.id for file in sdk.files.list(limit=2)] == made[::-1]
    assert [file.id for file in sdk.files.list(limit=5, order="asc")] == made
    jobs = [
        sdk.fine_tuning.jobs.create(model="base", training_file=made[0], metadata={"k": str(i)}).id
        for i in range(3)
    ]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=1)] == jobs[::-1]
    assert [job.id for job in sdk.fine_tuning.jobs.list(metadata={"k": "1"})] == [jobs[1]]
    assert len(list(sdk.fine_tuning.jobs.list(metadata=None))) == 3  # the SDK sends no None
    assert len(list(sdk.fine_tuning.jobs.list_events(jobs[0], limit=1))) == 2
    assert list(sdk.fine_tuning.jobs.checkpoints.list(jobs[0])) == []
    assert sdk.fine_tuning.jobs.cancel(jobs[0]).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        sdk.fine_tuning.jobs.cancel(jobs[0])


@pytest.mark.parametrize(
    ("report", "status"),
    [
        (DatasetReport(n_rows=1, n_valid_rows=1), "processed"),
        (
            DatasetReport(
                n_rows=1,
                n_valid_rows=0,
                n_findings=1,
                findings=[RowFinding(line=1, code="x", message="No.")],
            ),
            "error",
        ),
    ],
)
def test_the_sdk_waits_until_a_file_is_linted(
    sdk: OpenAI, database: Database, report: DatasetReport, status: str
) -> None:
    file = sdk.files.create(file=ROW, purpose="fine-tune")
    assert (file.status, file.filename) == ("uploaded", "upload")
    with database.write() as session:
        files.record_report(session, file.id, report)
    assert sdk.files.wait_for_processing(file.id, poll_interval=0.05).status == status
    assert sdk.files.content(file.id).read() == ROW
    assert sdk.files.delete(file.id).deleted
