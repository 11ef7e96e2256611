"""The page's words: English in the templates, other languages in one catalogue each."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "texts"
ENGLISH = "en"


@cache
def catalogue(language: str) -> Mapping[str, str]:
    """Return the translations of English sentences into a language."""
    path = FOLDER / f"{language}.json"
    found: dict[str, str] = json.loads(path.read_text()) if path.is_file() else {}
    return found


@cache
def languages() -> tuple[str, ...]:
    return (ENGLISH, *sorted(path.stem for path in FOLDER.glob("*.json")))


def choose(accept_language: str) -> str:
    """Return the best language of an Accept-Language header that there is a catalogue for."""
    wanted = []
    for part in accept_language.split(","):
        tag, _, quality = part.strip().partition(";q=")
        try:
            weight = float(quality) if quality else 1.0
        except ValueError:
            weight = 0.0
        wanted.append((-weight, tag.partition("-")[0].lower()))
    return next(
        (tag for _, tag in sorted(wanted, key=lambda each: each[0]) if tag in languages()), ENGLISH
    )


def translator(language: str) -> Callable[[str], str]:
    """Return what turns an English sentence into the language; what is not there stays English."""
    known = catalogue(language)
    return lambda sentence: known.get(sentence, sentence)
