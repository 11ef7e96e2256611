"""Loops are kept beside the files that they are of, or at home, or not at all."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.kernels import cache


@pytest.fixture(autouse=True)
def looked_for_anew() -> Iterator[None]:
    cache.folder.cache_clear()
    yield
    cache.folder.cache_clear()


def at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the files of the loops in another folder."""
    place.mkdir()
    (place / "cache.py").write_text("same")
    monkeypatch.setattr(cache, "__file__", str(place / "cache.py"))


def test_other_files_have_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(tmp_path / "kernels", monkeypatch)
    first = cache.folder()
    assert first is not None
    assert first.parent == tmp_path / "kernels" / "__pycache__"
    cache.folder.cache_clear()
    (tmp_path / "kernels" / "cache.py").write_text("changed")
    assert cache.folder() != first


def test_where_nothing_can_be_written_beside_them_loops_are_kept_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(tmp_path / "kernels", monkeypatch)
    (tmp_path / "kernels" / "__pycache__").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = cache.folder()
    assert found is not None
    assert found.is_relative_to(tmp_path / "home")


def test_all_are_there_once_that_was_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(tmp_path / "kernels", monkeypatch)
    assert not cache.is_complete()
    cache.mark_complete()
    assert cache.is_complete()


def test_where_nothing_can_be_kept_there_is_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at(tmp_path / "kernels", monkeypatch)
    (tmp_path / "kernels" / "__pycache__").write_text("no folder")
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder() is None
    assert cache.is_complete()
    cache.mark_complete()


def test_a_worker_can_ask_without_torch() -> None:
    code = "import sys, worker.kernels.cache; print({'torch', 'numba'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
