"""The documents say what the program is."""

import re
from pathlib import Path

import pytest

from models.settings import ENV_PREFIX, Settings
from models.settings_table import settings_page

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MAX_ADR_LINES = 60


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that a forge gives the headings of a page."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text(), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


def test_the_table_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs" / "settings.md").read_text() == settings_page(), (
        "run: python -m models.settings_table > docs/settings.md"
    )


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        file_name, _, anchor = target.partition("#")
        file = (path.parent / file_name) if file_name else path
        assert file.exists(), f"{path.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_settings_exist(path: Path) -> None:
    known = {
        f"{ENV_PREFIX}{name.upper()}{member}"
        for name, field in Settings.model_fields.items()
        for member in [
            f"__{member.upper()}" for member in getattr(field.annotation, "model_fields", {})
        ]
        or [""]
    }
    named = set(re.findall(rf"\b{ENV_PREFIX}\w*[A-Z]\b", path.read_text()))
    assert named - known == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert "check" in targets
    named = set(re.findall(r"(?:^|`|\$ )make ([a-z]+)", path.read_text(), re.MULTILINE))
    assert named - targets == set()


def test_continuous_integration_runs_what_the_documents_name() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^make .*$", script, re.MULTILINE)
    assert commands == ["make check", "make test"]
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(command in contributing for command in commands)


def test_decision_records_are_short_and_complete() -> None:
    for path in (ROOT / "docs" / "adr").glob("*.md"):
        text = path.read_text()
        assert re.fullmatch(r"\d{4}-[a-z0-9-]+\.md", path.name), path.name
        assert len(text.splitlines()) <= MAX_ADR_LINES, path.name
        for part in ("Context", "Decision", "Consequences"):
            assert re.search(rf"^#+ {part}", text, re.MULTILINE), f"{path.name} lacks {part}"
