"""Fixtures of the trainer's tests: few threads, a tiny base model on disk, a service around it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.worker.training.service import Service, chat_rows
from tests.worker.training.tiny import save_base
from worker.base_models import BaseModelInfo, load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_base(
    smollm2: tuple[Path, BaseModelInfo], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny random Llama with SmolLM2's tokenizer."""
    return save_base(tmp_path_factory.mktemp("tiny-base"), load_tokenizer(smollm2[0]))


@pytest.fixture
def service(tmp_path: Path, tiny_base: Path) -> Iterator[Service]:
    service = Service.create(tmp_path, tiny_base)
    service.upload("file-train", chat_rows(12))
    yield service
    service.database.close()
