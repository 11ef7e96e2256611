"""Fixtures that every part of the suite shares."""

from pathlib import Path

import pytest

from models.settings import ModelSettings
from worker.base_models import BaseModelInfo, materialise

# The fixtures that run real servers: valkey_url, postgres_url, seaweedfs.
pytest_plugins = ("tests.services",)

SMOLLM2 = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def base_model_cache() -> Path:
    """Converted base models, kept between runs: converting takes 15 s and never changes."""
    return Path("~/.cache/tunery-tests/base-models").expanduser()


@pytest.fixture(scope="session")
def smollm2(base_model_cache: Path) -> tuple[Path, BaseModelInfo]:
    """The real SmolLM2-135M-Instruct as safetensors, and its identity."""
    return materialise(SMOLLM2, ModelSettings(cache_dir=base_model_cache))
