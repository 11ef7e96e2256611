"""What a text that is not UTF-8 most likely is: said in the error, never converted by guess."""

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain

from worker.data.containers import UnreadableError
from worker.data.records import Fault

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_AROUND = 200
_ICONV = {"Windows-1252": "CP1252", "Shift-JIS": "SHIFT_JIS"}


def wide_encoding(head: bytes) -> str:
    """Return UTF-16 or UTF-32 if a file begins like that, with a mark or without."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    sample = head[:64]
    if len(sample) >= 8:
        # Markup is ASCII, so every second (or all but every fourth) byte of it is NUL.
        if sample[1:8:2] == b"\0" * 4 and b"\0" not in sample[0:8:2]:
            return "UTF-16"
        if sample[0:8:2] == b"\0" * 4 and b"\0" not in sample[1:8:2]:
            return "UTF-16"
        if sample[1:4] == sample[5:8] == b"\0\0\0" or sample[0:3] == sample[4:7] == b"\0\0\0":
            return "UTF-32"
    return ""


def suspected_encoding(text: bytes) -> str:
    """Return the likeliest encoding of bytes that are no UTF-8, or an empty string.

    Western letters stand alone between ASCII, those of East Asia come in pairs; which of these it
    is shows in what share of the characters belongs to the script.
    """
    if _share_of_single_bytes(text) > 0.7:
        return "Windows-1252"
    for name, codec, wanted, share in (
        ("Shift-JIS", "shift_jis", _is_kana, 1 / 3),
        ("EUC-JP", "euc_jp", _is_kana, 1 / 3),
        ("EUC-KR", "euc_kr", _is_hangul, 0.9),
        ("GB18030", "gb18030", _is_han, 1 / 3),
    ):
        try:
            decoded = text.decode(codec)
        except UnicodeDecodeError:
            continue
        foreign = [char for char in decoded if ord(char) > 127]
        if foreign and sum(map(wanted, foreign)) >= share * len(foreign):
            return name
    return ""


def _share_of_single_bytes(text: bytes) -> float:
    """Return what share of the bytes beyond ASCII has only ASCII beside it."""
    padded = b" " + text + b" "
    high = [at for at in range(1, len(padded) - 1) if padded[at] > 127]
    single = [at for at in high if padded[at - 1] < 128 and padded[at + 1] < 128]
    return len(single) / len(high) if high else 0.0


def _is_kana(char: str) -> bool:
    return "\u3040" <= char <= "\u30ff"


def _is_han(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"


def _is_hangul(char: str) -> bool:
    return "\uac00" <= char <= "\ud7a3"


def not_utf8(text: bytes, at: int, offset: int) -> Fault:
    """Return the fault of a byte that is no UTF-8.

    Args:
        text: The bytes around it.
        at: Its place in `text`.
        offset: The place of `text` in the file.
    """
    name = suspected_encoding(text)
    hint = "Save the file as UTF-8."
    if name:
        hint = f"It looks like {name}: iconv -f {_ICONV.get(name, name)} -t UTF-8."
    return Fault(
        "invalid_encoding",
        f"byte {offset + at} of the file (0x{text[at]:02X}) is not valid UTF-8.",
        hint=hint,
    )


def not_utf8_at_all(name: str) -> Fault:
    """Return the fault of a file in UTF-16 or UTF-32."""
    return Fault(
        "invalid_encoding",
        f"the file is not UTF-8: at byte offset 0 it starts like {name}.",
        hint=f"Save it as UTF-8: iconv -f {name} -t UTF-8.",
    )


def decoded_lines(chunks: Iterable[bytes]) -> Iterator[str]:
    """Yield the lines of a text, each with its line feed.

    Raises:
        UnreadableError: a byte is not UTF-8; the error has its line and offset.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    rest, offset, n_lines = "", 0, 0
    for chunk in chain(chunks, [b""]):
        try:
            text = rest + decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            bad, start = bytes(error.object), error.start
            line = n_lines + 1 + rest.count("\n") + bad.count(b"\n", 0, start)
            before = min(start, _AROUND)
            around = bad[start - before : start + _AROUND]
            place = offset - (len(bad) - len(chunk)) + start - before
            raise UnreadableError(not_utf8(around, before, place), line) from error
        *lines, rest = text.split("\n")
        offset += len(chunk)
        n_lines += len(lines)
        yield from (f"{each}\n" for each in lines)
    if rest:
        yield rest
