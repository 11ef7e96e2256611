"""Adapters as files: out as PEFT's two, in through a strict loader, never anything else."""

import io
import json
import struct
import zipfile
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update

from models.db import Database
from models.errors import UnprocessableError
from models.settings import Settings
from models.storage import adapter_prefix, open_store
from models.tables import BaseModel
from tests.api.calls import chat, expect, new_job
from tests.api.fake_inference import FakeInference

URL = "/v1/adapters"
CONFIG = json.dumps({"peft_type": "LORA", "r": 2}).encode()
WEIGHTS = struct.pack("<Q", 2) + b"{}"


@pytest.fixture(autouse=True)
def _known_base(inference: FakeInference, database: Database) -> None:
    with database.write() as session:
        session.execute(update(BaseModel).values(vocab_size=256))


def packed(files: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in (files or GOOD).items():
            archive.writestr(name, data)
    return content.getvalue()


GOOD = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS, "README.md": b"x"}


def bring(client: TestClient, content: bytes, **form: Any) -> httpx2.Response:
    data = {"model": "base", "suffix": "mine", **form}
    return client.post(URL, files={"file": ("a.zip", content)}, data=data)


def stored(settings: Settings) -> list[str]:
    return [info.key for info in open_store(settings.storage).list("adapters")]


def test_an_adapter_is_brought_in_called_downloaded_and_archived(
    client: TestClient, inference: FakeInference
) -> None:
    made = bring(client, packed()).json()
    name = made["id"]
    assert name.startswith("ft:base:local:mine:")
    assert (made["object"], made["job_id"], made["objective"]) == ("adapter", None, "imported")
    assert inference.warmed[0].digest == made["digest"]
    assert chat(client, model=name).status_code == 200
    answer = client.get(f"{URL}/{name}/download")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-disposition"].endswith('.zip"')
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.read("adapter_config.json") == CONFIG
        assert archive.read("adapter_model.safetensors") == WEIGHTS
    again = bring(client, answer.content).json()
    assert (again["digest"], again["id"] != name) == (made["digest"], True)
    assert client.post(f"{URL}/{name}/archive").json()["archived_at"] is not None
    assert chat(client, model=name).status_code == 404
    assert name not in client.get("/v1/models").text
    assert client.get(f"{URL}/{name}").json()["lineage"] == []
    assert client.post(f"{URL}/{name}/restore").json()["archived_at"] is None
    assert chat(client, model=name).status_code == 200
    expect(new_job(client, model=name), 400, "model", "model_not_trainable")
    expect(client.get(f"{URL}/base/download"), 400, "model", "model_not_fine_tuned")
    expect(client.post(f"{URL}/base/archive"), 400, "model", "model_not_archivable")


def test_what_the_loader_refuses_leaves_nothing_behind(
    client: TestClient, inference: FakeInference, settings: Settings
) -> None:
    inference.refuse(UnprocessableError("It has no tensor.", code="invalid_adapter"))
    refused = bring(client, packed())
    assert expect(refused, 400, "file", "invalid_adapter") == "It has no tensor."
    assert stored(settings) == []
    inference.refusal = None
    kept = bring(client, packed()).json()
    inference.refuse(UnprocessableError("It has no tensor.", code="invalid_adapter"))
    assert bring(client, packed()).status_code == 400
    assert f"{adapter_prefix(kept['digest'])}/adapter_config.json" in stored(settings)


FAULTY: dict[str, dict[str, bytes]] = {
    "no file 'adapter_model.safetensors'": {"adapter_config.json": CONFIG},
    "pytorch_model.bin": GOOD | {"pytorch_model.bin": b"\x80\x02"},
    "adapter_model.bin": {"adapter_config.json": CONFIG, "adapter_model.bin": b"x"},
    "'../adapter_config.json'": GOOD | {"../adapter_config.json": CONFIG},
    "two files": {"a/adapter_config.json": CONFIG, "b/adapter_config.json": CONFIG},
    "entries": {f"{n}/README.md": b"" for n in range(99)},
}


@pytest.mark.parametrize("reason", FAULTY)
def test_an_archive_of_anything_else_is_refused(
    client: TestClient, inference: FakeInference, settings: Settings, reason: str
) -> None:
    refused = bring(client, packed(FAULTY[reason]))
    assert reason in expect(refused, 400, "file", "invalid_adapter")
    assert (inference.warmed, stored(settings)) == ([], [])


def test_no_zip_bomb_and_no_other_compression_gets_in(client: TestClient) -> None:
    bomb = packed(GOOD | {"adapter_model.safetensors": bytes(100_000)})
    assert len(bomb) < 1000  # the limit of these tests is 2000 bytes
    expect(bring(client, bomb), 413, "file", "file_too_large")
    strange = packed(compression=zipfile.ZIP_LZMA)
    assert "deflated" in expect(bring(client, strange), 400, "file", "invalid_adapter")
    assert "zip archive" in expect(bring(client, b"PK?"), 400, "file", "invalid_adapter")
    expect(bring(client, packed(), model="none"), 400, "model", "model_not_found")
    expect(bring(client, packed(), suffix="a b"), 400, "suffix", "invalid_value")
