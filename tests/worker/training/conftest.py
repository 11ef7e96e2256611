"""Fixtures of the trainer's tests: few threads, a tiny base model on disk, a service around it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from tests.worker.training.service import Service, chat_rows
from tests.worker.training.tiny import save_base
from worker.base_models import load_tokenizer


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_base(small_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that speaks through the first of SmolLM2's tokens."""
    return save_base(tmp_path_factory.mktemp("tiny-base"), load_tokenizer(small_tokenizer))


@pytest.fixture(scope="session")
def arranged(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A service with one linted file; each test copies it, which is much faster."""
    root = tmp_path_factory.mktemp("service")
    service = Service.create(root, tiny_base)
    service.upload("file-train", chat_rows(12))
    service.database.close()
    return root


@pytest.fixture
def service(tmp_path: Path, tiny_base: Path, arranged: Path) -> Iterator[Service]:
    shutil.copytree(arranged, tmp_path, dirs_exist_ok=True)
    service = Service.open(tmp_path, tiny_base)
    yield service
    service.database.close()
