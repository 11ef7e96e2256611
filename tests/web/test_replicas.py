"""Two replicas of the API behind nginx, under a path: the page stays whole when one dies."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from models.db import Database
from models.domain.status import JobStatus
from models.processes import die_with_parent
from models.registry import jobs
from tests.flow.conftest import process, wait_until
from tests.web.site import (
    TOTAL_STEPS,
    Site,
    everything,
    make_key,
    open_context,
    rows,
    settings_in,
)

PREFIX = "/forge"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
CONFIGURATION = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream api {{ server 127.0.0.1:{first}; server 127.0.0.1:{second}; }}
  server {{
    listen 127.0.0.1:{port};
    location {prefix}/ {{
      proxy_pass http://api/; proxy_http_version 1.1;
      proxy_set_header Host $http_host; proxy_set_header Connection "";
    }}
  }}
}}
"""
WATCH = """() => {
    window.stays = true;
    window.marks = [];
    const mark = document.getElementById('mark');
    new MutationObserver(() => window.marks.push(mark.dataset.state))
        .observe(mark, {attributes: true});
}"""


@dataclass
class Replica:
    """One process of the API, which can be killed and started again on its port."""

    environment: dict[str, str]
    port: int
    log: Path
    closing: ExitStack
    running: psutil.Popen | None = None

    def start(self) -> None:
        self.running = self.closing.enter_context(
            process("api.cli", self.environment, self.log, "api")
        )

    def wait(self) -> None:
        wait_until(lambda: is_healthy(f"http://127.0.0.1:{self.port}"), 60, "a replica")

    def kill(self) -> None:
        assert self.running is not None
        self.running.kill()
        self.running.wait()


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def nginx(folder: Path, first: int, second: int, port: int) -> Iterator[str]:
    """Run nginx, which asks the two replicas in turn and strips the prefix."""
    if NGINX is None:
        pytest.skip("two replicas behind a proxy need nginx: apt-get install nginx-light")
    values = {"folder": folder, "first": first, "second": second, "port": port, "prefix": PREFIX}
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format_map(values))
    running = subprocess.Popen(
        [NGINX, "-c", str(file), "-p", str(folder)],
        stderr=subprocess.DEVNULL,
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        url = f"http://127.0.0.1:{port}{PREFIX}"
        wait_until(lambda: is_healthy(url), 60, "nginx")
        yield url
    finally:
        running.terminate()
        running.wait()


@dataclass
class Fleet:
    site: Site
    replicas: list[Replica]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Fleet]:
    """A fleet for both tests: starting a process of the API takes seconds."""
    tmp_path = tmp_path_factory.mktemp("fleet")
    shutil.copy(migrated_sqlite, tmp_path / "tunery.db")
    settings = settings_in(tmp_path)
    *ports, port = free_ports(3)
    environment = {
        "TUNERY_DATABASE__URL": settings.database.url,
        "TUNERY_BROKER__URL": settings.broker.url.get_secret_value(),
        "TUNERY_STORAGE__URL": settings.storage.url,
        "TUNERY_MODELS__CATALOG": '{"base": "path:/nowhere"}',
        "TUNERY_API__ROOT_PATH": PREFIX,
    }
    database = Database(settings.database)
    with ExitStack() as stack:
        stack.callback(database.close)
        replicas = [
            Replica(environment | {"TUNERY_API__PORT": str(each)}, each, tmp_path / "log", stack)
            for each in ports
        ]
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait()
        url = stack.enter_context(nginx(tmp_path, ports[0], ports[1], port))
        site = Site(url, *make_key(database), database, settings, tmp_path / "scratch")
        yield Fleet(site, replicas)


def start_by_hand(site: Site, page: Page, path: str) -> str:
    """Start a job on an uploaded file from the page, and have a worker claim it."""
    page.goto(f"{site.url}/ui/jobs/new?file={path.rpartition('/')[2]}")
    page.get_by_role("button", name="Start").click()
    page.wait_for_url(re.compile(f"{PREFIX}/ui/jobs/ftjob-"))
    job_id = page.url.rpartition("/")[2]
    with site.database.write() as session:
        jobs.move(session, job_id, JobStatus.QUEUED)
    site.start(job_id)
    return job_id


def test_a_replica_that_dies_costs_no_reload_and_no_point(browser: Browser, fleet: Fleet) -> None:
    site = fleet.site
    context = open_context(browser, site)
    path = site.upload(rows(40))
    page = context.new_page()
    job_id = start_by_hand(site, page, path)
    mark, chart = page.locator("#mark"), page.locator("#loss-chart")
    expect(mark).to_have_attribute("data-state", "open")
    page.evaluate(WATCH)
    last = 0
    # One of the two holds the stream, so that it breaks at least once.
    for replica in fleet.replicas:
        site.steps(job_id, last + 1, last + 10)
        expect(page.locator("#step")).to_have_attribute("data-last-step", str(last + 10))
        replica.kill()
        site.steps(job_id, last + 11, last + 20)
        last += 20
        expect(chart).to_have_attribute("data-points", str(last), timeout=20_000)
        expect(mark).to_have_attribute("data-state", "open")
        replica.start()
        replica.wait()
    assert "lost" in page.evaluate("window.marks")
    site.steps(job_id, last + 1, TOTAL_STEPS)
    site.finish(job_id)
    expect(chart).to_have_attribute("data-points", str(TOTAL_STEPS), timeout=20_000)
    expect(page.locator("#step")).to_have_attribute("data-last-step", str(TOTAL_STEPS))
    assert page.evaluate("window.stays"), "the page was loaded anew"
    context.close()


def test_every_page_works_under_a_path(browser: Browser, fleet: Fleet) -> None:
    site = fleet.site
    site.faults.clear()  # of the replicas that were killed
    context = open_context(browser, site)
    page = context.new_page()
    for path in everything(site):
        response = page.goto(site.url + path)
        assert response is not None
        assert response.status == 200, path
        page.wait_for_load_state("load")
        time.sleep(0.1)
    assert [each for each in site.faults if "503" not in each] == []
    context.close()
