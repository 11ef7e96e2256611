"""``tunery adapters``: in, shown, out again, away and back."""

import json
import threading
import zipfile
from pathlib import Path

from sqlalchemy import update

from models.db import Database
from models.registry import inference_servers, merges
from models.registry.inference_servers import Announcement
from models.tables import BaseModel
from tests.api.adapters.test_archive import CONFIG, packed
from tests.api.cli.conftest import Tunery
from tests.api.fake_inference import running_fake


def test_an_adapter_is_imported_shown_downloaded_archived_and_restored(
    tunery: Tunery, database: Database, tmp_path: Path
) -> None:
    archive = tmp_path / "outside.zip"
    archive.write_bytes(packed())
    with running_fake() as fake:
        with database.write() as session:
            session.execute(update(BaseModel).values(vocab_size=256))
            server = Announcement("fake-1", "base", "f" * 64, "nf4", fake.url)
            inference_servers.announce(session, server, 60)
        name = tunery("adapters", "import", str(archive), "-m", "base", "--suffix", "mine").strip()
    assert name.startswith("ft:base:local:mine:")
    listed = tunery("adapters", "list")
    for part in (name, "imported", "lora"):
        assert part in listed
    assert json.loads(tunery("adapters", "list", "--json", "--text", "nothing"))["data"] == []
    assert json.loads(tunery("adapters", "show", name))["id"] == name

    target = tmp_path / "back.zip"
    assert "bytes" in tunery("adapters", "download", name, "--to", str(target))
    with zipfile.ZipFile(target) as back:
        assert back.read("adapter_config.json") == CONFIG
    again = tunery("adapters", "download", name, "--to", str(target), status=1)
    assert "exists already" in again
    gone = tmp_path / "gone.zip"
    assert "model" in tunery("adapters", "download", "ft:x", "--to", str(gone), status=1)
    assert not gone.exists()

    assert tunery("adapters", "merge", name).strip() == "queued"

    def end() -> None:
        with database.write() as session:
            merge = merges.claim(session, 60)
            assert merge is not None
            merges.fail(session, merge.id, "It does not fit.")

    later = threading.Timer(0.3, end)
    later.start()
    assert "It does not fit." in tunery("adapters", "merge", name, "--to", str(gone), status=1)
    later.join()

    assert "by a merged copy" in tunery("adapters", "serve", name, "--merged")
    assert "merged" in tunery("adapters", "list")
    assert json.loads(tunery("adapters", "show", name))["merged"]
    assert "unmerged" in tunery("adapters", "serve", name, "--unmerged")
    assert "merged" not in tunery("adapters", "list")
    assert "does not exist" in tunery("adapters", "serve", "ft:x", "--merged", status=1)

    tunery("adapters", "archive", name)
    assert "archived" in tunery("adapters", "list")
    assert name not in tunery("models")
    tunery("adapters", "restore", name)
    assert name in tunery("models")
