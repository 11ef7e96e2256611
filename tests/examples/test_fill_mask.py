"""The shipped example, end to end: BERT learns greetings by masked words, and fills a gap."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI
from pydantic import SecretStr

from api.app import create_app
from examples import fill_mask
from models.registry import inference_servers, jobs, tenancy
from models.registry.inference_servers import Announcement
from tests.api.fake_inference import serving
from tests.worker.training.service import Service
from worker.base_models import BaseModelInfo
from worker.inference.process import HttpThread, build_service, listen
from worker.lint_files import FileLinter
from worker.tasks import _demand_of
from worker.training import exit_codes

TOKEN = "secret-between-servers"


@dataclass
class Stage:
    """A running API and encoder server, and the service behind them."""

    service: Service
    client: httpx.Client
    url: str
    key: str


@pytest.fixture(scope="module")
def stage(
    minilm: tuple[Path, BaseModelInfo], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stage]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("article")
    service = Service.create(root, minilm[0])
    settings = service.settings.model_copy(
        update={
            "inference": service.settings.inference.model_copy(
                update={
                    "model": "tiny",
                    "precision": "fp32",
                    "device": "cpu",
                    "port": 0,
                    "adapter_cache_dir": root / "adapters",
                    "token": SecretStr(TOKEN),
                }
            ),
            "broker": service.settings.broker.model_copy(
                update={"url": SecretStr(f"redis+socket://{root / 'nobody.sock'}")}
            ),
        }
    )
    with service.database.write() as session:
        project = tenancy.default_project(session)
        _, key = tenancy.create_key(session, project.id, "test")
    listener, server_url = listen(settings.inference)
    encoder, info = build_service(settings)
    http = HttpThread(encoder, TOKEN, listener)
    http.start_and_wait()
    with service.database.write() as session:
        server = Announcement("encoder-1", "tiny", info.fingerprint, "fp32", server_url)
        inference_servers.announce(session, server, 600)
    try:
        with (
            serving(create_app(settings), lifespan="on") as url,
            httpx.Client(
                base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60
            ) as client,
        ):
            yield Stage(service, client, url, key)
    finally:
        encoder.close()
        http.stop()
        service.database.close()


def test_the_gap_is_filled_with_what_was_learned(stage: Stage) -> None:
    client, service = stage.client, stage.service
    files = {"file": ("greetings.jsonl", fill_mask.rows())}
    file = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}).json()
    made = client.post("/v1/fine_tuning/jobs", json=fill_mask.job("tiny", file["id"]))
    assert made.status_code == 200, made.text
    settings = service.settings
    assert FileLinter(service.database, service.store, settings.worker).lint_next()
    with service.database.write() as session:
        assert jobs.advance_validated(session, _demand_of) == 1
    job = service.claim()
    assert service.run(job) == exit_codes.DONE
    done = client.get(f"/v1/fine_tuning/jobs/{job.id}").json()
    assert done["objective"]["mask_token_id"] == 103
    trace = service.trace(job.id)
    assert trace[-1].train_loss < 0.5 * trace[0].train_loss
    filled = fill_mask.fill(client, done["fine_tuned_model"])
    assert filled["text"] == "hello, how are you?"
    assert filled["masks"][0][0]["text"] == "you"
    # The base model has no such head, and says so.
    body = {"model": "tiny", "input": fill_mask.QUESTION}
    refused = client.post("/v1/fill_mask", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "model")
    # An encoder does not chat, and is not trained to.
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    assert client.post("/v1/chat/completions", json=chat).status_code == 400
    wrong = {"model": "tiny", "training_file": file["id"], "objective": {"type": "sft"}}
    answer = client.post("/v1/fine_tuning/jobs", json=wrong)
    assert answer.json()["error"]["param"] == "objective.type"


def test_the_sdk_gets_embeddings_that_know_what_belongs_together(stage: Stage) -> None:
    client = OpenAI(base_url=f"{stage.url}/v1", api_key=stage.key, max_retries=0)
    texts = ["A cat sits on the mat.", "A kitten lies on a rug.", "Interest rates rose in May."]
    answer = client.embeddings.create(model="tiny", input=texts)
    first, near, far = (torch.tensor(each.embedding) for each in answer.data)
    assert float(first.norm()) == pytest.approx(1)
    assert float(first @ near) > float(first @ far) + 0.3
    plain = client.embeddings.create(model="tiny", input=texts[0], encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(first.tolist(), abs=1e-6)
    assert answer.usage.prompt_tokens > plain.usage.prompt_tokens > 5
