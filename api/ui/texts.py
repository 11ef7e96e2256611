"""The page's words: English in the templates, other languages in one catalogue each."""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape

from models.domain.status import FileStatus, JobStatus

FOLDER = Path(__file__).parent / "texts"
SCRIPTS = Path(__file__).parent / "static" / "js"
WORDS = frozenset(
    {
        *(str(each).replace("_", " ") for each in (*JobStatus, *FileStatus)),
        *("active", "revoked", "online", "draining", "offline", "busy", "idle"),
        *("preparing", "training", "done", "system", "light", "dark"),
    }
)
"""What templates and scripts translate by a variable: states, stages, themes."""
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


def translator(language: str) -> Callable[..., Markup]:
    """Return what turns an English sentence into the language; what is not there stays English.

    Its further arguments take the places of ``{name}`` in the sentence; text is escaped.
    """
    known = catalogue(language)

    def translate(sentence: str, **values: object) -> Markup:
        found = escape(known.get(sentence, sentence))
        return found.format(**values) if values else found

    return translate


@cache
def of_scripts(language: str) -> Mapping[str, str]:
    """Return the translations of the sentences that the page's scripts say."""
    known = catalogue(language)
    return {each: known[each] for each in sorted(script_sentences() | WORDS) if each in known}


@cache
def script_sentences() -> frozenset[str]:
    scripts = sorted(SCRIPTS.glob("*.js"))
    return frozenset(each for path in scripts for each in sentences(path.read_text()))


def sentences(source: str) -> list[str]:
    """Return what a template or a script hands to `translator`, in order."""
    return re.findall(r'\bt\("([^"]+)"', source)
