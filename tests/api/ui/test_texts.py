"""The page in the reader's language, as far as there is a catalogue."""

import re

import pytest

from api.ui import pages, texts


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("ja", "ja"),
        ("fr, ja;q=0.5, en;q=0.3", "ja"),
        ("en-US,ja;q=0.9", "en"),
        ("fr", "en"),
        ("", "en"),
        ("ja;q=x", "ja"),
    ],
)
def test_the_best_language_there_is(header: str, language: str) -> None:
    assert texts.choose(header) == language


def test_what_is_not_translated_stays_english() -> None:
    t = texts.translator("ja")
    assert t("Jobs") == "ジョブ"
    assert t("No such sentence") == "No such sentence"
    assert texts.translator("en")("Jobs") == "Jobs"


def test_catalogues_hold_sentences_of_the_templates_and_no_others() -> None:
    used = set()
    for path in (pages.HERE / "templates").glob("*.html"):
        used |= set(re.findall(r"""\bt\(["']([^"']+)["']\)""", path.read_text()))
    used |= {"Jobs", "Data sets", "Models", "Playground"}
    for language in texts.languages()[1:]:
        assert set(texts.catalogue(language)) - used == set()
