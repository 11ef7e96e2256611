"""Settings: read once, refused when wrong, secret where they must be."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.settings import (
    ENV_PREFIX,
    ApiSettings,
    Settings,
    WorkerSettings,
    child_environment,
    load_settings,
)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in child_environment():
        if name.upper().startswith(ENV_PREFIX):
            monkeypatch.delenv(name)


def test_without_variables_everything_is_local() -> None:
    settings = load_settings()
    assert settings.database.url.startswith("sqlite:")
    assert settings.storage.url.startswith("file:")
    assert settings.api.host == settings.inference.host == "127.0.0.1"


def test_variables_reach_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_API__PORT", "9000")
    monkeypatch.setenv("TUNERY_WORKER__WARM_SPARE", "false")
    monkeypatch.setenv("TUNERY_MODELS__CATALOG", json.dumps({"mine": "path:/models/mine"}))
    monkeypatch.setenv("TUNERY_MODELS__CACHE_DIR", "/var/cache/models")
    monkeypatch.setenv("TUNERY_LOG_LEVEL", "DEBUG")
    settings = load_settings()
    assert settings.api.port == 9000
    assert settings.worker.warm_spare is False
    assert settings.models.catalog == {"mine": "path:/models/mine"}
    assert settings.models.cache_dir == Path("/var/cache/models")
    assert settings.log_level == "DEBUG"


def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose passes `${NAME:-}` as an empty string."""
    monkeypatch.setenv("TUNERY_STORAGE__ENDPOINT", "")
    monkeypatch.setenv("TUNERY_API__PORT", "")
    settings = load_settings()
    assert settings.storage.endpoint is None
    assert settings.api.port == 8470


@pytest.mark.parametrize(
    "name", ["TUNERY_DATABSE__URL", "TUNERY_PORT", "tunery_nothing", "TUNERY_", "TUNERY__API__PORT"]
)
def test_an_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=f"^{name} is no setting.*TUNERY_DATABASE"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "location"),
    [
        ("TUNERY_API__PROT", "1", "api.prot"),
        ("TUNERY_API__PORT", "65536", "api.port"),
        ("TUNERY_API__PORT", "eight", "api.port"),
        ("TUNERY_API__MAX_BODY_BYTES", "0", "api.max_body_bytes"),
        ("TUNERY_API__ORGANIZATION", "a:b", "api.organization"),
        ("TUNERY_WORKER__LEASE_SECONDS", "nan", "worker.lease_seconds"),
        ("TUNERY_WORKER__LEASE_SECONDS", "inf", "worker.lease_seconds"),
        ("TUNERY_INFERENCE__PRECISION", "int3", "inference.precision"),
        ("TUNERY_LOG_LEVEL", "debug", "log_level"),
    ],
)
def test_a_bad_value_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, location: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError) as caught:
        load_settings()
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [location]


def test_a_heartbeat_that_is_too_slow_for_the_lease_is_refused() -> None:
    assert WorkerSettings(lease_seconds=15, heartbeat_seconds=5)
    with pytest.raises(ValidationError, match="at most a third of lease_seconds"):
        WorkerSettings(lease_seconds=14.9, heartbeat_seconds=5)


def test_settings_cannot_be_changed_afterwards() -> None:
    settings = Settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.log_level = "DEBUG"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        settings.api.port = 1  # type: ignore[misc]


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "correct-horse-battery"
    names = [
        "BROKER__URL",
        "STORAGE__ACCESS_KEY_ID",
        "STORAGE__SECRET_ACCESS_KEY",
        "INFERENCE__TOKEN",
        "CLIENT__API_KEY",
    ]
    for name in names:
        monkeypatch.setenv(ENV_PREFIX + name, secret)
    settings = load_settings()
    assert settings.inference.token.get_secret_value() == secret
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert secret not in shown


def test_a_child_gets_this_environment_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_API__PORT", "1")
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setenv("DROPPED", "dropped")
    child = child_environment({"TUNERY_API__PORT": "2"}, without=("DROPPED", "NEVER_SET"))
    assert child["TUNERY_API__PORT"] == "2"
    assert child["KEPT"] == "kept"
    assert "DROPPED" not in child
    monkeypatch.setenv("TUNERY_API__PORT", "3")
    assert child["TUNERY_API__PORT"] == "2"


def test_every_setting_is_described() -> None:
    groups = [field.annotation for field in Settings.model_fields.values()]
    assert ApiSettings in groups
    for group in groups:
        for name, field in getattr(group, "model_fields", {}).items():
            assert field.description, f"{group}.{name}"
            assert field.description.endswith("."), f"{group}.{name}"
