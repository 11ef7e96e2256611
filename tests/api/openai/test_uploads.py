"""Uploads in parts with the real SDK: any order, in parallel, over a restart, and every refusal."""

import hashlib
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from openai import OpenAI
from sqlalchemy import update

from api.app import create_app
from models.db import Database
from models.registry import tenancy, uploads
from models.settings import Settings
from models.storage import LocalStore
from models.tables import Upload
from tests.api.calls import ROW
from tests.api.fake_inference import serving

CONTENT = b"".join(ROW.replace(b"}", b" " * (number % 7) + b"}", 1) + b"\n" for number in range(16))
PIECES = [CONTENT[at : at + 200] for at in range(0, len(CONTENT), 200)]


@pytest.fixture
def secret(database: Database) -> str:
    with database.write() as session:
        project = tenancy.default_project(session)
        return tenancy.create_key(session, project.id, "test")[1]


@pytest.fixture
def sdk(settings: Settings, secret: str) -> Iterator[OpenAI]:
    with (
        serving(create_app(settings), lifespan="on") as url,
        OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=20) as client,
    ):
        yield client


def begin(sdk: OpenAI, n_bytes: int = len(CONTENT)) -> str:
    upload = sdk.uploads.create(
        bytes=n_bytes, filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert (upload.status, upload.bytes, upload.file) == ("pending", n_bytes, None)
    assert upload.expires_at - upload.created_at == 3600
    return upload.id


def objects(settings: Settings) -> list[str]:
    root = Path(settings.storage.url.removeprefix("file:"))
    store = LocalStore(root)
    return [info.key for prefix in ("files", "uploads") for info in store.list(prefix)]


def test_parts_come_in_any_order_and_in_parallel(sdk: OpenAI, settings: Settings) -> None:
    upload = begin(sdk)
    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda piece: sdk.uploads.parts.create(upload, data=piece), reversed(PIECES))
        )
    part_ids = [part.id for part in reversed(made)]
    md5 = hashlib.md5(CONTENT).hexdigest()
    done = sdk.uploads.complete(upload, part_ids=part_ids, md5=md5)
    assert done.status == "completed"
    assert done.file is not None
    assert (done.file.bytes, done.file.purpose) == (len(CONTENT), "fine-tune")
    assert sdk.files.content(done.file.id).read() == CONTENT
    again = sdk.uploads.complete(upload, part_ids=part_ids)
    assert again.file is not None
    assert again.file.id == done.file.id
    assert objects(settings) == [f"files/{done.file.id}"]
    for call in (
        lambda: sdk.uploads.cancel(upload),
        lambda: sdk.uploads.parts.create(upload, data=b"x"),
    ):
        with pytest.raises(openai.BadRequestError, match="is completed"):
            call()


def test_the_helper_of_the_sdk_works(sdk: OpenAI) -> None:
    done = sdk.uploads.upload_file_chunked(
        file=io.BytesIO(CONTENT).getvalue(),
        filename="rows.jsonl",
        bytes=len(CONTENT),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=300,
    )
    assert done.file is not None
    assert sdk.files.content(done.file.id).read() == CONTENT


def test_an_upload_survives_a_restart_of_the_api(settings: Settings, secret: str) -> None:
    part_ids: list[str] = []
    upload = ""
    for start, end in ((0, 3), (3, len(PIECES))):
        with (
            serving(create_app(settings), lifespan="on") as url,
            OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0) as client,
        ):
            upload = upload or begin(client)
            known = client.get(f"/uploads/{upload}", cast_to=dict[str, object])["parts"]
            assert [part["id"] for part in known] == part_ids  # type: ignore[attr-defined]
            part_ids += [
                client.uploads.parts.create(upload, data=piece).id for piece in PIECES[start:end]
            ]
            if end == len(PIECES):
                done = client.uploads.complete(upload, part_ids=part_ids)
                assert done.file is not None
                assert client.files.content(done.file.id).read() == CONTENT


def test_a_cancelled_upload_leaves_nothing_behind(sdk: OpenAI, settings: Settings) -> None:
    upload = begin(sdk)
    part = sdk.uploads.parts.create(upload, data=PIECES[0])
    assert len(objects(settings)) == 1
    assert sdk.uploads.cancel(upload).status == "cancelled"
    assert objects(settings) == []
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        sdk.uploads.complete(upload, part_ids=[part.id])


def test_what_does_not_fit_is_refused_and_loses_nothing(sdk: OpenAI, settings: Settings) -> None:
    upload = begin(sdk)
    first, second = (sdk.uploads.parts.create(upload, data=piece).id for piece in PIECES[:2])
    other = sdk.uploads.parts.create(begin(sdk, 10), data=b"0123456789").id
    before = objects(settings)
    for part_ids, code in (
        ([first, second], "upload_size_mismatch"),
        ([first, other], "part_not_found"),
        ([first, first], "part_repeated"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            sdk.uploads.complete(upload, part_ids=part_ids)
        assert refused.value.code == code
    with pytest.raises(openai.BadRequestError) as empty:
        sdk.uploads.parts.create(upload, data=b"")
    assert empty.value.code == "empty_file"
    small = begin(sdk, 4)
    part = sdk.uploads.parts.create(small, data=b"abcd").id
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.uploads.complete(small, part_ids=[part], md5="0" * 32)
    assert wrong.value.code == "checksum_mismatch"
    assert sdk.uploads.complete(small, part_ids=[part]).status == "completed"
    with pytest.raises(openai.NotFoundError):
        sdk.uploads.parts.create("upload_nothing", data=b"x")
    assert set(before) <= set(objects(settings))


def test_limits_on_size_are_told_before_the_bytes(sdk: OpenAI, settings: Settings) -> None:
    with pytest.raises(openai.APIStatusError) as too_large:
        begin(sdk, settings.api.max_upload_bytes + 1)
    assert too_large.value.status_code == 413
    small = begin(sdk, 4)
    for _ in range(4):
        sdk.uploads.parts.create(small, data=b"abcd")
    with pytest.raises(openai.BadRequestError) as flooded:
        sdk.uploads.parts.create(small, data=b"abcd")
    assert flooded.value.code == "upload_too_large"


def test_an_upload_expires(sdk: OpenAI, settings: Settings, database: Database) -> None:
    upload = begin(sdk)
    sdk.uploads.parts.create(upload, data=PIECES[0])
    with database.write() as session:
        session.execute(update(Upload).values(expires_at=1.0))
    with pytest.raises(openai.BadRequestError, match="expired"):
        sdk.uploads.parts.create(upload, data=PIECES[1])
    with database.write() as session:
        (key,) = uploads.expire(session)
        assert uploads.expire(session) == []
    assert objects(settings) == [key]
    with database.read() as session:
        assert session.get_one(Upload, upload).status == "expired"
