"""Requests made from the OpenAPI document, good and bad: no answer is a surprise.

``python -m tests.contract.fuzzing`` (``make fuzz``) sends many; the suite a few.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app
from api.cli.migrate import upgrade
from models.db import Database
from models.logs import configure_logging
from models.registry import inference_servers, tenancy
from models.registry.inference_servers import Announcement
from models.settings import Settings
from tests.api.fake_inference import running_fake, serving

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
SHARE_KNOWN = 0.6
TIMEOUT_SECONDS = 60


@dataclass(frozen=True, slots=True)
class Target:
    """A running service, a key of it, and ids that exist, by the parameter that takes them."""

    url: str
    key: str
    known: dict[str, str]


@contextmanager
def service(settings: Settings) -> Iterator[Target]:
    """Run the API on a port, with an inference server and a few objects."""
    database = Database(settings.database)
    with database.write() as session:
        project = tenancy.default_project(session)
        _, key = tenancy.create_key(session, project.id, "fuzz")
    with serving(create_app(settings), lifespan="on") as url, running_fake() as fake:
        with database.write() as session:
            server = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, server, 3600)
        yield Target(url, key, {"project_id": project.id, "model": "base"})
    database.close()


def fuzz(target: Target, n_examples: int, first_seed: int) -> list[str]:
    """Send `n_examples` good and as many bad requests to each operation; return what is wrong."""
    schema = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    failures: dict[tuple[str, str], str] = {}
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        for mode in GenerationMode:
            for problem in _fuzz(operation, mode, target, n_examples, first_seed):
                failures.setdefault((operation.label, problem[:80]), problem)
    return [f"{label}: {problem}" for (label, _), problem in failures.items()]


def _fuzz(
    operation: Any, mode: GenerationMode, target: Target, n_examples: int, first_seed: int
) -> list[str]:
    chance = random.Random(f"{first_seed} {operation.label} {mode}")
    problems: list[str] = []

    @seed(chance.getrandbits(32))
    @hypothesis_settings(
        max_examples=n_examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        problems.extend(_send(case, target, chance))

    with suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
        send()
    return problems


def _send(case: Case, target: Target, chance: random.Random) -> list[str]:
    changed = False
    for place in (case.path_parameters, case.query):
        for name in set(place or {}) & set(target.known):
            if chance.random() < SHARE_KNOWN:
                place[name] = target.known[name]
                changed = True
    headers = {"authorization": f"Bearer {target.key}"}
    if case.meta is not None and case.meta.is_negative_at(ParameterLocation.HEADER):
        headers = {}  # a good key would put right what is wrong
    response = case.call(headers=headers, timeout=TIMEOUT_SECONDS)
    # What was put right by hand may be good after all.
    checks = [check for check in CHECKS if not (changed and check is negative_data_rejection)]
    try:
        case.validate_response(response, checks=checks)
    except FailureGroup as group:
        curl = case.as_curl_command()
        return [f"{failure} {response.status_code} {curl[:400]}" for failure in group.exceptions]
    return []


def _settings(folder: Path) -> Settings:
    url = f"sqlite:///{folder / 'tunery.db'}"
    upgrade(url)
    fields: dict[str, Any] = {
        "database": {"url": url},
        "broker": {"url": f"redis+socket://{folder / 'nobody.sock'}"},
        "storage": {"url": f"file:{folder / 'objects'}"},
        "inference": {"token": "secret-between-servers"},
        "models": {"catalog": {"base": "path:/nowhere"}},
    }
    return Settings.model_validate(fields)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=200, help="requests of each kind")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    options = parser.parse_args()
    configure_logging("ERROR", "fuzz")
    with tempfile.TemporaryDirectory() as folder, service(_settings(Path(folder))) as target:
        problems = fuzz(target, options.examples, options.seed)
    sys.stdout.write(
        "\n".join([*problems, f"{len(problems)} problems, seed {options.seed}"]) + "\n"
    )
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
