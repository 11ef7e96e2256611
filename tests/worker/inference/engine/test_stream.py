"""Text that leaves token by token: whole characters, and no part of a stop string."""

import random
from pathlib import Path

import pytest

from tests.worker.inference.tiny import decode_bytes
from worker.base_models import BaseModelInfo, load_tokenizer
from worker.inference.engine.stream import TextStream

TEXTS = [
    "Plain English, with  two spaces and\n\nlines.",
    "日本語のテキストも、途中で切れない。",
    "Family 👩‍👩‍👧‍👦, flag 🇯🇵, skin 👍🏽, accent é and é.",
    "עברית العربية हिन्दी ไทย",
]


def pieces_of(stream: TextStream, ids: list[int]) -> tuple[list[str], bool]:
    pieces = []
    for token in ids:
        text, stopped = stream.push(token)
        pieces.append(text)
        if stopped:
            return pieces, True
    return [*pieces, stream.finish()], False


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_come_out_as_whole_characters(text: str) -> None:
    pieces, _ = pieces_of(TextStream(decode_bytes), list(text.encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_real_tokenizer_gives_its_own_text_piece_by_piece(
    text: str, smollm2: tuple[Path, BaseModelInfo]
) -> None:
    tokenizer = load_tokenizer(smollm2[0])
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(lambda ids: str(tokenizer.decode(list(ids))))
    pieces, _ = pieces_of(stream, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_each_piece_leaves_as_soon_as_it_is_complete() -> None:
    stream = TextStream(decode_bytes)
    assert [stream.push(byte)[0] for byte in "aé🙂".encode()] == ["a", "", "é", "", "", "", "🙂"]


def test_half_a_character_at_the_end_is_dropped() -> None:
    pieces, _ = pieces_of(TextStream(decode_bytes), [*b"ok ", *"🙂".encode()[:3]])
    assert "".join(pieces) == "ok "


def test_invalid_bytes_inside_a_text_are_replaced_and_do_not_hold_it_up() -> None:
    pieces, _ = pieces_of(TextStream(decode_bytes), [*b"a", 0xFF, *b"b"])
    assert pieces == ["a", "", "\ufffdb", ""]
    endless, _ = pieces_of(TextStream(decode_bytes), [0xFF] * 100)
    assert len("".join(endless)) > 80


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO two", ["STOP"], "one STO two"),
        ("aaab", ["aab"], "a"),
        ("ends with STO", ["STOP"], "ends with STO"),
        ("first or second", ["second", "or"], "first "),
        ("x日本語y", ["本語"], "x日"),
        ("STOP at once", ["STOP"], ""),
        ("overlap ababac", ["abac"], "overlap ab"),
        ("line\n\nnext", ["\n\n"], "line"),
    ],
)
def test_stop_strings_end_the_text_and_never_leak(
    text: str, stop: list[str], expected: str
) -> None:
    pieces, stopped = pieces_of(TextStream(decode_bytes, stop), list(text.encode()))
    assert "".join(pieces) == expected
    assert stopped == any(s in text for s in stop)
    sent = ""
    for piece in pieces:
        sent += piece
        assert expected.startswith(sent)


def test_random_texts_end_at_the_first_stop_string() -> None:
    draw = random.Random(7)
    for _ in range(300):
        text = "".join(draw.choices("abé", k=20))
        stop = ["".join(draw.choices("abé", k=draw.randint(1, 3))) for _ in range(2)]
        pieces, _ = pieces_of(TextStream(decode_bytes, stop), list(text.encode()))
        # The earliest *end* of a match decides, as the stream stops at the token completing it.
        ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
        seen = text[: min(ends)] if ends else text
        starts = [at for s in stop if (at := seen.find(s)) >= 0]
        assert "".join(pieces) == (seen[: min(starts)] if starts else text)
