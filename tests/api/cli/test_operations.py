"""``tunery workers`` and ``tunery usage``."""

import json

from models.db import Database
from models.domain.machine import Device, Machine
from models.registry import audit, tenancy, usage, workers
from models.registry.usage import Used, User
from tests.api.cli.conftest import Tunery

GPU = Device(type="cuda", index=0, name="H100", memory_total=80, memory_used=3)
MACHINE = Machine(devices=(GPU,), memory_total=8, memory_available=5, memory_used=2**31)


def test_workers_and_what_was_used_are_printed(tunery: Tunery, database: Database) -> None:
    with database.write() as session:
        about = workers.Announcement("box:1", "box", 7, "0.1.0", 1, MACHINE)
        workers.announce(session, about, 60)
        user = User(tenancy.default_project(session).id, None, "base")
        usage.add(session, [(user, Used(trained_tokens=1234, device_seconds=5400))])
    shown = tunery("workers")
    for part in ("box:1", "training", "H100", "2.0 GiB", "idle"):
        assert part in shown
    assert json.loads(tunery("workers", "--json"))["data"][0]["id"] == "box:1"
    assert "draining" in tunery("drain", "box:1")
    assert "takes no new job" in tunery("workers")
    assert "online" in tunery("drain", "box:1", "--undo")
    shown = tunery("usage")
    for part in ("base", "1,234", "1.50"):
        assert part in shown
    result = json.loads(tunery("usage", "--by", "key", "--json"))["data"][0]["results"][0]
    assert (result["api_key_id"], result["trained_tokens"]) == (None, 1234)
    assert "neither" in tunery("usage", "--by", "colour", status=2)


def test_changes_are_printed_with_their_keys(tunery: Tunery, database: Database) -> None:
    with database.write() as session:
        project = tenancy.default_project(session).id
        audit.record(session, audit.Change(project, "file.deleted", "file-x", key_id="key_x"))
    shown = tunery("audit")
    for part in ("file.deleted", "file-x", "key_x"):
        assert part in shown
    (entry,) = json.loads(tunery("audit", "--json"))["data"]
    assert entry["id"].startswith("audit_log-")
