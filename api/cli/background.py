"""``tunery up`` in the background, for commands that bring their own service and take it away."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from api.cli.client import Client
from api.cli.home import Home
from models.errors import UnavailableError
from models.processes import die_with_parent
from models.settings import child_environment

START_SECONDS = 300
STOP_SECONDS = 90


@contextmanager
def running_service(home: Home) -> Iterator[Client]:
    """Run ``tunery up`` beside this process for as long as the block lasts."""
    home.create()
    log_file = home.log_file("up")
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "api.cli", "up", "--home", str(home.path), "--port", "0"],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while (running := home.running()) is None or running.pid != process.pid:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UnavailableError(f"The service did not start. Its log: {log_file}")
            time.sleep(0.1)
        key = home.read_key()
        assert key is not None, "a service that is up has written its key"
        yield Client(running.url, key)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for_model(client: Client, model: str) -> None:
    """Ask `model` for one token until it answers: a first start converts the base's weights."""
    deadline = time.monotonic() + START_SECONDS
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    while True:
        try:
            client.post("/chat/completions", body)
            return
        except UnavailableError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)
