"""What a text that is not UTF-8 most likely is, is said and never used."""

import pytest

from worker.data.text_encodings import not_utf8, suspected_encoding, wide_encoding

JAPANESE = "水深はいくらですか。四メートルです。"


@pytest.mark.parametrize(
    ("text", "codec", "name"),
    [
        (JAPANESE, "shift_jis", "Shift-JIS"),
        (JAPANESE, "euc_jp", "EUC-JP"),
        ("水深多少、四米。请问码头在哪里。", "gb18030", "GB18030"),
        ("수심이 얼마입니까? 사 미터입니다.", "euc_kr", "EUC-KR"),
        ("Östlich der Brücke für Gäste", "cp1252", "Windows-1252"),
    ],
)
def test_the_likeliest_encoding_is_named_with_its_remedy(text: str, codec: str, name: str) -> None:
    data = text.encode(codec)
    assert suspected_encoding(data) == name
    fault = not_utf8(data, 0, 100)
    assert fault.code == "invalid_encoding"
    assert "byte 100 of the file" in fault.message
    assert name in fault.hint
    assert "iconv -f" in fault.hint


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_wide_encodings_are_told_from_the_first_bytes(codec: str) -> None:
    assert wide_encoding('{"messages": []}'.encode(codec)) == codec[:6].upper()


@pytest.mark.parametrize("text", ["", "a", '{"a": 1}', JAPANESE, "\x00\x00"])
def test_utf8_is_not_taken_for_a_wide_encoding(text: str) -> None:
    assert wide_encoding(text.encode()) == ""
