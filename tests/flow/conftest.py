"""Whole services for tests: real processes on real ports, gone when the test is over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest
from openai import OpenAI

from api.cli.home import Home
from models.processes import die_with_parent

START_SECONDS = 120
PATIENCE = 3
HARBOUR_DESK = Path(__file__).parents[2] / "examples" / "harbour-desk.jsonl"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll `condition` until it is true; fail with `what` was awaited after `seconds`.

    Some processors are several times slower than others; that is no failure, so they wait longer.
    """
    seconds *= PATIENCE
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.05)


def first_rows(path: Path, n_rows: int) -> Path:
    """Write the first rows of the example data to `path`."""
    path.write_bytes(b"".join(HARBOUR_DESK.read_bytes().splitlines(keepends=True)[:n_rows]))
    return path


@contextmanager
def process(
    module: str, environment: dict[str, str], log: Path, *arguments: str
) -> Iterator[psutil.Popen]:
    """Run ``python -m module`` until the block ends."""
    with log.open("ab") as output:
        running = psutil.Popen(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        yield running
    finally:
        if running.poll() is None:
            running.terminate()
            try:
                running.wait(60)
            except psutil.TimeoutExpired:
                running.kill()
                running.wait()


class Up:
    """A running ``tunery up`` and clients for it, which `run_up` closes."""

    def __init__(self, home: Home, running: psutil.Popen, closing: ExitStack) -> None:
        self.home = home
        self.process = running
        self._closing = closing

    @property
    def url(self) -> str:
        found = self.home.running()
        assert found is not None
        return found.url

    @property
    def key(self) -> str:
        secret = self.home.read_key()
        assert secret is not None
        return secret

    def client(self) -> OpenAI:
        client = OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)
        return self._closing.enter_context(client)

    def interrupt(self) -> None:
        """Do what Ctrl-C does, and wait for the end."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(90)


@contextmanager
def run_up(directory: Path, cache: Path, *arguments: str) -> Iterator[Up]:
    """Run ``tunery up --home DIRECTORY --port 0`` and enter the block when it is announced."""
    home = Home(directory)
    home.path.mkdir(parents=True, exist_ok=True)
    log = home.path / "up.log"
    environment = {"TUNERY_MODELS__CACHE_DIR": str(cache)}
    command = ("up", "--home", str(directory), "--port", "0", *arguments)
    with process("api.cli", environment, log, *command) as running, ExitStack() as closing:

        def is_up() -> bool:
            if running.poll() is not None:
                pytest.fail(f"'tunery up' ended with status {running.poll()}:\n{log.read_text()}")
            return home.running() is not None

        wait_until(is_up, START_SECONDS, "tunery up")
        yield Up(home, running, closing)


@pytest.fixture(scope="package")
def up(
    tmp_path_factory: pytest.TempPathFactory, smollm2: object, base_model_cache: Path
) -> Iterator[Up]:
    """One embedded service with the real SmolLM2 for all tests of this folder, gone after them."""
    with run_up(tmp_path_factory.mktemp("up") / "home", base_model_cache) as service:
        client = service.client()

        def answers() -> bool:
            response = client.chat.completions.with_raw_response
            try:
                response.create(
                    model="smollm2-135m-instruct",
                    messages=[{"role": "user", "content": "Hi"}],
                    max_tokens=1,
                )
            except Exception as error:
                if getattr(error, "status_code", None) == 503:
                    return False
                raise
            return True

        wait_until(answers, START_SECONDS, "an answer of the base")
        yield service
