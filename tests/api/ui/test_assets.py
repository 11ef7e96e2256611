"""Files of the page: kept for ever under their version, and by no other."""

from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from api.ui.assets import Assets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "js").mkdir()
    (tmp_path / "js" / "a.js").write_text("one")
    return tmp_path


def get(folder: Path, path: str) -> tuple[int, str, str]:
    client = TestClient(Starlette(routes=[Mount("/static", Assets(folder))]))
    answer = client.get(f"/static/{path}")
    return answer.status_code, answer.text, answer.headers.get("cache-control", "")


def test_the_present_version_is_kept_for_ever(folder: Path) -> None:
    url = Assets(folder).url("js/a.js")
    assert get(folder, url) == (200, "one", "public, max-age=31536000, immutable")


def test_another_version_is_the_present_file_and_not_kept(folder: Path) -> None:
    old = Assets(folder).url("js/a.js")
    (folder / "js" / "a.js").write_text("two")
    assert Assets(folder).url("js/a.js") != old
    assert get(folder, old) == (200, "two", "no-cache")


def test_nothing_outside_of_the_folder_is_served(folder: Path) -> None:
    secret = folder.parent / "secret.txt"
    secret.write_text("no")
    for path in ("x/../secret.txt", "x/%2e%2e/secret.txt", "x/nothing.js"):
        assert get(folder, path)[0] == 404
