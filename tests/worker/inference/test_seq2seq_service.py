"""Encoder-decoders over HTTP: a text becomes another, with the base and with an adapter."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from models.domain.generation import AdapterRef
from models.settings import (
    DatabaseSettings,
    InferenceSettings,
    ModelSettings,
    Settings,
    StorageSettings,
)
from models.storage import open_store
from tests.worker.inference.conftest import TOKEN, running
from tests.worker.inference.test_own_model import write_adapter
from tests.worker.inference.tiny import publish
from tests.worker.training.encoders import save_encoder
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.inference.process import build_service

SOURCE = "The harbour office opens at seven."
N_TOKENS = 6

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


class Place:
    """A tiny T5 that speaks through SmolLM2's tokenizer, a LoRA on it, and a server of both."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, root: Path) -> None:
        self.tokenizer = tokenizer
        changes = {"vocab_size": len(self.tokenizer), "eos_token_id": self.tokenizer.eos_token_id}
        self.directory = save_encoder(root / "base", "t5", **changes)
        self.tokenizer.save_pretrained(self.directory)
        settings = Settings(
            database=DatabaseSettings(url=f"sqlite:///{root}/tunery.db"),
            storage=StorageSettings(url=f"file:{root}/objects"),
            models=ModelSettings(
                cache_dir=root / "cache", catalog={"tiny-t5": f"path:{self.directory}"}
            ),
            inference=InferenceSettings(
                adapter_cache_dir=root / "adapters",
                device="cpu",
                token=TOKEN,
                model="tiny-t5",
                precision="fp32",
            ),
        )
        self.service, info = build_service(settings)
        self.lora = write_adapter(root / "lora", {"type": "lora", "r": 4}, model=self.load())
        self.ref = publish(open_store(settings.storage), self.lora, info)

    def load(self) -> Any:
        return AutoModelForSeq2SeqLM.from_pretrained(self.directory).eval()

    def expected(self, model: Any) -> str:
        ids = torch.tensor([self.tokenizer(SOURCE)["input_ids"]])
        output = model.generate(ids, max_new_tokens=N_TOKENS, do_sample=False)
        return str(self.tokenizer.decode(output[0, 1:], skip_special_tokens=True))


@pytest.fixture(scope="module")
def place(smollm2: tuple[Path, BaseModelInfo], tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(load_tokenizer(smollm2[0]), tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[httpx.Client]:
    with running(place.service) as client:
        yield client


def ask(client: httpx.Client, adapter: AdapterRef | None = None, **changes: Any) -> httpx.Response:
    body = {
        "request_id": "r",
        "base_model": "tiny-t5",
        "adapter": None if adapter is None else adapter.model_dump(),
        "messages": [{"role": "user", "content": SOURCE}],
        "sampling": {"temperature": 0, "max_tokens": N_TOKENS},
    }
    return client.post("/generate", json={**body, **changes})


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    events = [json.loads(line) for line in response.text.splitlines()]
    assert [event["type"] for event in events][:: len(events) - 1] == ["started", "finished"]
    return "".join(event["text"] for event in events if event["type"] == "chunk")


def test_base_and_adapter_write_what_the_library_generates(
    place: Place, client: httpx.Client
) -> None:
    base = place.expected(place.load())
    adapted = place.expected(PeftModel.from_pretrained(place.load(), str(place.lora)).eval())
    assert base != adapted
    assert text_of(ask(client)) == base
    assert text_of(ask(client, place.ref)) == adapted
    assert text_of(ask(client, messages=None, prompt=SOURCE)) == base
    merged = place.ref.model_copy(update={"merged": True})
    for ref, served in ((place.ref, "own"), (merged, "merged"), (place.ref, "own")):
        assert text_of(ask(client, ref)) == adapted
        health = client.get("/health").json()
        assert health["status"] == "ok"
        assert [each["served"] for each in health["own_models"]] == [served]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "messages"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "so many words " * 1000}]}, "messages"),
        ({"messages": None, "prompt": "a", "echo": True}, "echo"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": None, "prompt": ""}, "prompt"),
    ],
)
def test_what_is_no_single_text_is_refused(
    client: httpx.Client, changes: dict[str, Any], param: str
) -> None:
    response = ask(client, **changes)
    assert response.status_code == 400, response.text
    assert param in response.text
