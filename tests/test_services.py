"""The real servers that other tests rely on."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import create_engine, text

from tests.services import run_valkey, service_directory

ROOT = Path(__file__).parents[1]
START_ALL = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from tests.services import run_postgres, run_seaweedfs, run_valkey
with ExitStack() as stack:
    for run in (run_valkey, run_postgres, run_seaweedfs):
        directory = Path(sys.argv[1], run.__name__)
        directory.mkdir()
        stack.enter_context(run(directory))
    sys.stdout.write("ready\\n")
    sys.stdout.flush()
    time.sleep(300)
"""


def client(url: str) -> redis.Redis:
    return redis.Redis(unix_socket_path=url.removeprefix("redis+socket://"))


def test_valkey_keeps_its_data_and_listens_on_no_port() -> None:
    with service_directory("valkey") as directory:
        with run_valkey(directory) as server, client(server.url) as connection:
            connection.set("a", "1")
            connections = psutil.Process(server.process.pid).net_connections("inet")
            assert connections == []
            assert (directory / "valkey.sock").stat().st_mode & 0o077 == 0
        assert server.process.poll() is not None
        with run_valkey(directory) as server, client(server.url) as connection:
            assert connection.get("a") == b"1"


@pytest.mark.parametrize("round_", [1, 2])
def test_each_test_gets_an_empty_postgresql_database(postgres_url: str, round_: int) -> None:
    engine = create_engine(postgres_url)
    try:
        with engine.begin() as connection:
            assert (
                connection.scalar(text("SELECT count(*) FROM pg_tables WHERE tablename = 'a'")) == 0
            )
            connection.execute(text("CREATE TABLE a (id integer)"))
            assert str(connection.scalar(text("SHOW server_encoding"))) == "UTF8"
    finally:
        engine.dispose()


def test_no_server_outlives_a_killed_test_process() -> None:
    with service_directory("orphans") as directory:
        directory.chmod(0o755)
        parent = subprocess.Popen(
            [sys.executable, "-c", START_ALL, str(directory)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        with parent:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            servers = psutil.Process(parent.pid).children(recursive=True)
            names = {server.name() for server in servers}
            assert {"valkey-server", "postgres", "weed"} <= names
            left = [c.laddr for s in servers for c in s.net_connections("unix") if c.laddr]
            parent.kill()
        deadline = time.monotonic() + 30
        while (alive := [s for s in servers if s.is_running()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        for path in left:
            Path(path).unlink(missing_ok=True)
        assert alive == []
