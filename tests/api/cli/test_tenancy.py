"""``tunery key`` and ``tunery project``."""

from models.db import Database
from models.registry import audit, tenancy
from models.registry.page import Cursor
from tests.api.cli.conftest import Tunery


def test_a_project_is_made_limited_listed_and_given_a_key(
    tunery: Tunery, database: Database
) -> None:
    project_id = tunery("project", "create", "team", "--organization", "acme").strip()
    tunery("project", "limit", "team", "max_bytes=1000", "share=2.5", "max_running_jobs=1")
    tunery("project", "limit", "team", "max-running-jobs=none")
    listed = tunery("project", "list")
    (line,) = [line for line in listed.splitlines() if project_id in line]
    assert "acme" in line
    assert "share=2.5, max_bytes=1,000" in line
    assert "max_running_jobs" not in line
    made = tunery("key", "create", "ci", "--project", "team", "--requests-per-minute", "7")
    key_id, secret = made.split()
    assert key_id in tunery("key", "list")
    with database.read() as session:
        key = tenancy.authenticate(session, secret)
        assert (key.id, key.requests_per_minute, key.project_id) == (key_id, 7, project_id)
    tunery("key", "revoke", key_id)
    assert "revoked" in tunery("key", "list")
    with database.read() as session:
        entries = audit.list_page(session, project_id, Cursor()).rows
    assert [(entry.type, entry.object_id, entry.key_id) for entry in entries] == [
        ("api_key.deleted", key_id, None),
        ("api_key.created", key_id, None),
        ("project.updated", project_id, None),
        ("project.updated", project_id, None),
        ("project.created", project_id, None),
    ]
    assert entries[2].details == {"limits": {"max_running_jobs": None}}


def test_what_is_no_limit_is_refused_by_name(tunery: Tunery) -> None:
    tunery("project", "create", "team")
    assert "max_bytes" in tunery("project", "limit", "team", "bytes=1", status=1)
    assert "number" in tunery("project", "limit", "team", "max_bytes=many", status=1)
    assert "max_bytes" in tunery("project", "limit", "team", "max_bytes=1.5", status=1)
    assert "No project" in tunery("project", "limit", "nobody", "max_bytes=1", status=1)
