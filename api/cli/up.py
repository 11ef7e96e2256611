"""``tunery up``: the whole service on one machine, with everything included."""

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

import httpx
from rich.console import Console

from api.cli.home import Home
from api.cli.migrate import upgrade
from api.cli.supervisor import Child
from api.cli.valkey import valkey_command, valkey_url
from models.db import Database
from models.errors import ConflictError, UnavailableError
from models.registry import inference_servers, tenancy
from models.settings import DatabaseSettings, Settings

START_SECONDS = 60
POLL_SECONDS = 0.2


class StopFlag:
    """Counts SIGINT and SIGTERM: one asks to stop, a second one to hurry."""

    def __init__(self) -> None:
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    @property
    def is_set(self) -> bool:
        return self.count > 0

    def is_impatient(self) -> bool:
        return self.count > 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run: where, on which port, with which base models to answer from."""

    home: Home
    port: int
    models: list[str]


def run(plan: Plan, settings: Settings, console: Console) -> None:
    """Run the service until Ctrl-C or SIGTERM; leaves no process behind.

    Raises:
        ConflictError: the home or the port is taken.
        UnavailableError: a part did not start.
    """
    stop = StopFlag()
    home = plan.home
    home.create()
    with home.locked(), home.socket_directory() as sockets, ExitStack() as stack:
        port = _free_port(plan.port)
        url = f"http://127.0.0.1:{port}"
        broker = sockets / "valkey.sock"
        environment = home.environment(valkey_url(broker), port) | _model_cache(home, settings)

        def start(child: Child) -> Child:
            child.start()
            stack.callback(child.stop, stop.is_impatient)
            return child

        valkey = start(
            Child(
                "valkey",
                valkey_command(home.path / "valkey", broker),
                {},
                home.log_file("valkey"),
            )
        )
        _wait(broker.exists, [valkey], stop)
        upgrade(home.database_url)
        key = _prepare(home)
        # Stopped in reverse: the worker, which may be saving a checkpoint, before the broker.
        children = [valkey, start(_service("api", [], home, environment))]
        _wait(lambda: _is_healthy(url), children, stop)
        children.append(start(_service("worker", [], home, environment)))
        for model in plan.models:
            one = environment | {"TUNERY_INFERENCE__MODEL": model}
            name = "inference" if len(plan.models) == 1 else f"inference-{len(children)}"
            children.append(start(_service("inference", [], home, one, log=name)))
        with home.announced(url):
            _greet(console, url, key, home)
            _tend(children, plan.models, home, stop, console)
        console.print("Stopping. Running jobs save a checkpoint first; press Ctrl-C to hurry.")
    console.print("Stopped.")


def _service(
    process: str, arguments: list[str], home: Home, environment: dict[str, str], log: str = ""
) -> Child:
    command = [sys.executable, "-m", "api.cli", process, *arguments]
    grace = 75 if process == "worker" else 15
    return Child(log or process, command, environment, home.log_file(log or process), grace)


def _model_cache(home: Home, settings: Settings) -> dict[str, str]:
    if "cache_dir" in settings.models.model_fields_set:
        return {}
    return {"TUNERY_MODELS__CACHE_DIR": str(home.path / "base-models")}


def _free_port(port: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise ConflictError(
                f"Port {port} is taken. Choose another one with --port (0 picks a free one)."
            ) from None
        return int(probe.getsockname()[1])


def _wait(is_ready: Callable[[], bool], children: list[Child], stop: StopFlag) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        for child in children:
            if child.exit_code is not None:
                raise UnavailableError(
                    f"{child.name} ended with status {child.exit_code} while starting. "
                    f"Its log: {child.log_file}"
                )
        if stop.is_set:
            raise UnavailableError("Stopped while starting.")
        if time.monotonic() > deadline:
            raise UnavailableError(f"{children[-1].name} did not start in {START_SECONDS} s.")
        time.sleep(POLL_SECONDS / 4)


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@contextmanager
def _database(home: Home) -> Iterator[Database]:
    database = Database(DatabaseSettings(url=home.database_url))
    try:
        yield database
    finally:
        database.close()


def _prepare(home: Home) -> str:
    """Forget servers of an earlier run; return the first key, making it at the first start."""
    with _database(home) as database, database.write() as session:
        inference_servers.forget_all(session)
        secret = home.read_key()
        if secret is None:
            project = tenancy.default_project(session)
            _, secret = tenancy.create_key(session, project.id, "first key")
            home.write_key(secret)
    return secret


def _greet(console: Console, url: str, key: str, home: Home) -> None:
    console.print(f"\n[bold]Tunery is up:[/bold] {url}", highlight=False)
    console.print(f"  page:  {url}/ui", highlight=False)
    console.print(f"  key:   {key}", highlight=False)
    console.print(f"  logs:  {home.path / 'logs'}", highlight=False, soft_wrap=True)
    console.print(f"  SDK:   OpenAI(base_url='{url}/v1', api_key='…')", highlight=False)
    console.print("  Ctrl-C stops everything.\n")


def _tend(
    children: list[Child], models: list[str], home: Home, stop: StopFlag, console: Console
) -> None:
    waiting = set(models)
    while not stop.is_set:
        for child in children:
            if (sentence := child.tend()) is not None:
                console.print(f"[yellow]{sentence}[/yellow]", highlight=False, soft_wrap=True)
        if waiting:
            waiting = _still_loading(waiting, home, console)
        time.sleep(POLL_SECONDS)


def _still_loading(names: set[str], home: Home, console: Console) -> set[str]:
    loading = set()
    with _database(home) as database, database.read() as session:
        for name in names:
            try:
                inference_servers.for_base(session, name)
            except UnavailableError:
                loading.add(name)
            else:
                console.print(f"Base model {name} answers.", highlight=False)
    return loading
