"""``tunery up``: two homes side by side, and nothing left behind."""

import stat
import urllib.request
from pathlib import Path

import psutil
import pytest

from api.cli.home import Home
from tests.flow.conftest import Up, process, run_up, wait_until


def family(service: Up) -> list[psutil.Process]:
    return [service.process, *service.process.children(recursive=True)]


def is_healthy(url: str) -> bool:
    with urllib.request.urlopen(f"{url}/healthz", timeout=5) as response:
        return bool(response.status == 200)


def test_two_homes_run_side_by_side_and_leave_nothing_behind(
    tmp_path: Path, smollm2: object, base_model_cache: Path
) -> None:
    with (
        run_up(tmp_path / "one", base_model_cache) as one,
        run_up(tmp_path / "two", base_model_cache) as two,
    ):
        assert one.url != two.url
        assert one.key != two.key
        assert is_healthy(one.url)
        assert is_healthy(two.url)
        assert stat.S_IMODE(one.home.key_file.stat().st_mode) == 0o600
        assert [model.id for model in one.client().models.list()] == ["smollm2-135m-instruct"]
        relatives = family(one) + family(two)
        assert len(relatives) >= 2 * 5  # supervisor, valkey, api, worker, inference
        one.interrupt()
        assert is_healthy(two.url)
        two.process.terminate()
        two.process.wait(90)
        assert (one.process.returncode, two.process.returncode) == (0, 0)
    wait_until(
        lambda: not [relative for relative in relatives if relative.is_running()],
        5,
        "the end of every child",
    )


def test_a_child_that_dies_is_started_again_and_a_killed_supervisor_takes_all_along(
    tmp_path: Path, smollm2: object, base_model_cache: Path
) -> None:
    with run_up(tmp_path / "home", base_model_cache) as service:
        api = next(child for child in service.process.children() if child.cmdline()[-1] == "api")
        api.kill()

        def answers_again() -> bool:
            try:
                return is_healthy(service.url)
            except OSError:
                return False

        wait_until(lambda: not api.is_running(), 5, "the death of the API")
        wait_until(answers_again, 30, "the API's return")
        again = [child for child in service.process.children() if child.cmdline()[-1] == "api"]
        assert [child.pid != api.pid for child in again] == [True]
        children = service.process.children(recursive=True)
        assert len(children) >= 4
        service.process.kill()
        service.process.wait(10)
        wait_until(
            lambda: not [child for child in children if child.is_running()],
            10,
            "the end of every child",
        )


@pytest.mark.parametrize("fault", ["home", "port"])
def test_a_home_or_port_in_use_is_refused_with_a_remedy(up: Up, tmp_path: Path, fault: str) -> None:
    home = up.home.path if fault == "home" else tmp_path / "other"
    port = "0" if fault == "home" else up.url.rpartition(":")[2]
    log = tmp_path / "second.log"
    with process("api.cli", {}, log, "up", "--home", str(home), "--port", port) as second:
        assert second.wait(30) == 1
    remedy = "--home" if fault == "home" else "--port"
    assert remedy in log.read_text()
    assert is_healthy(up.url)


def test_a_long_home_path_still_has_a_socket(tmp_path: Path) -> None:
    home = Home(tmp_path / ("x" * 120))
    home.create()
    with home.socket_directory() as directory:
        assert len(str(directory / "valkey.sock")) < 108
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not directory.exists()
