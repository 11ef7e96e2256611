"""The page in the reader's language, as far as there is a catalogue."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markupsafe import Markup

from api.ui import frame, texts

TEMPLATES = sorted((frame.HERE / "templates").glob("*.html"))
WORD = re.compile(r"[A-Za-z]{2}")


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


def used_sentences() -> set[str]:
    found = set(texts.script_sentences() | texts.WORDS)
    for path in (*TEMPLATES, *frame.HERE.glob("*.py")):
        found |= set(texts.sentences(path.read_text()))
    return found


def test_every_sentence_has_a_translation_and_no_other_is_kept() -> None:
    used = used_sentences()
    assert len(used) > 200
    for language in texts.languages()[1:]:
        assert used - set(texts.catalogue(language)) == set()
        assert set(texts.catalogue(language)) - used == set()


def test_translations_have_the_places_of_their_sentences() -> None:
    for language in texts.languages()[1:]:
        for sentence, translation in texts.catalogue(language).items():
            places = [sorted(re.findall(r"\{\w+\}", each)) for each in (sentence, translation)]
            assert places[0] == places[1], sentence


SPOKEN = ("title", "placeholder", "aria-label", "alt")


class Plain(HTMLParser):
    """Collects the words of a template that no translator has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [
            value
            for name, value in attributes
            if value
            and name in ("title", "placeholder", "aria-label", "alt")
            and WORD.search(value)
        ]
        if tag not in ("input", "link", "meta"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._inside.pop()

    def handle_data(self, text: str) -> None:
        if WORD.search(text) and not {"pre", "code", "svg", "script"} & set(self._inside):
            self.found.append(text.strip())


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_says_nothing_but_through_the_translator(path: Path) -> None:
    text = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)
    # What is no sentence: names of the product, of formats, of fields.
    text = re.sub(r"Tunery|English|CSV|\(QLoRA\)|openapi\.json|(?<=<label>)type", "", text)
    parser = Plain()
    parser.feed(text)
    assert parser.found == []


def test_what_stands_in_a_sentence_is_escaped_and_markup_is_kept() -> None:
    t = texts.translator("en")
    assert t("Request {id}", id="<b>") == "Request &lt;b&gt;"
    assert t("{up} prints", up=Markup("<code>x</code>")) == "<code>x</code> prints"
