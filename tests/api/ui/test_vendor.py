"""The page's third-party files: exactly the pinned ones, and their absence is said."""

import json
from pathlib import Path

from api.ui import vendor


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert vendor.missing(tmp_path) == list(vendor.FILES)
    (tmp_path / "uplot.js").write_text("x")
    assert "uplot.js" not in vendor.missing(tmp_path)


def test_every_file_comes_from_a_package_that_is_pinned_with_its_hash() -> None:
    wanted = json.loads((vendor.ROOT / "package.json").read_text())["dependencies"]
    lock = json.loads((vendor.ROOT / "package-lock.json").read_text())["packages"]
    for source in vendor.FILES.values():
        package = "/".join(source.split("/")[: 2 if source.startswith("@") else 1])
        pinned = lock[f"node_modules/{package}"]
        assert pinned["version"] == wanted[package]
        assert pinned["integrity"].startswith("sha512-")
