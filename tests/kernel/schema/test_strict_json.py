"""`corral.schema.strict_json`: what is not clean JSON, and how it is told."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernel.schema.cases import TREES

from corral.errors import Invalid, Malformed, Problem
from corral.schema import strict_json
from corral.schema.conversion import encode
from corral.schema.strict_json import parse_json, replace_bad_characters


def refused(data: bytes) -> Problem:
    with pytest.raises(Problem) as caught:
        parse_json(data)
    return caught.value


def test_plain_json_is_parsed() -> None:
    assert parse_json(b' {"a": [1, -2.5, true, null, "x"], "b": {}} ') == {
        "a": [1, -2.5, True, None, "x"],
        "b": {},
    }


def test_white_space_after_a_body_does_not_parse_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors end files with a line end, and `curl --data-binary @file` sends it."""
    monkeypatch.setattr(strict_json._fast, "decode", lambda text: pytest.fail("parsed again"))
    assert parse_json(b' \r\n{"a": [1]}\t\r\n ') == {"a": [1]}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"[1", "line 1, column 3"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b"[1] 2", "column 5"),
        (b"{'a': 1}", "column 2"),
        (b"[01]", "column 3"),
        (b"[1,]", "column"),
        (b'["\x01"]', "control character"),
        (b'["a\n"]', "control character"),
        (rb'["\x"]', "escape"),
        (b"[NaN]", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "-Infinity"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'["\xff"]', "Byte 2"),
        (b'["\xed\xa0\x80"]', "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' appears more than once"),
        (b'[{"x": {"a": 1, "\\u0061": 3}}]', "'a' appears more than once"),
        ('{"\u00e9": 1, "e\u0301": 2}'.encode(), "more than once"),
        (b"[" * 65 + b"]" * 65, "64 levels"),
        (b"[" * 10_000_000, "64 levels"),
        (b'{"a":' * 100_000, "64 levels"),
        (b"]" * 1000, "column 1"),
    ],
)
def test_malformed_json_is_400_and_says_where(data: bytes, told: str) -> None:
    problem = refused(data)
    assert isinstance(problem, Malformed)
    assert (problem.status, problem.code) == (400, "malformed_json")
    assert told in problem.detail


def test_depth_counts_brackets_outside_strings_only() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64)
    assert parse_json(b'{"a":[' * 32 + b"]}" * 32)
    assert parse_json(json.dumps(["[" * 100, '"[' * 100, "\\" + "{" * 100]).encode())
    assert len(parse_json(b"[" + b"[]," * 1000 + b"[]]")) == 1001
    assert refused(b'["\\"",' + b"[" * 64).detail.startswith("The JSON nests")
    assert refused(b'["\\\\",' + b"[" * 64).detail.startswith("The JSON nests")


def test_everything_that_databases_refuse_is_told_with_its_pointer() -> None:
    huge = b"1" + b"0" * 10_000
    problem = refused(
        b'{"a": ["\\ud800", "\\u0000", 9223372036854775808, -9223372036854775808], "b/~": {"\\udfff": 1e999},'
        b'"c": -1e999, "d": %b, "e": -%b, "ok": [9223372036854775807, -9223372036854775807, "\\ud83d\\ude00"]}'
        % (huge, huge)
    )
    assert isinstance(problem, Invalid)
    assert problem.code == "validation_error"
    assert [(each.pointer, each.code) for each in problem.errors] == [
        ("/a/0", "bad_format"),
        ("/a/1", "bad_format"),
        ("/a/2", "too_large"),
        ("/a/3", "too_small"),
        ("/b~1~0/\ufffd", "bad_format"),
        ("/b~1~0/\ufffd", "too_large"),
        ("/c", "too_small"),
        ("/d", "too_large"),
        ("/e", "too_small"),
    ]
    assert problem.detail == "9 fields are not valid"
    encode(problem.document("/x", "1"))


def test_at_most_100_faults() -> None:
    problem = refused(json.dumps(["\x00"] * 5000).encode())
    assert len(problem.errors) == 100
    assert problem.detail == "More than 100 fields are not valid"


def test_strings_and_keys_are_nfc() -> None:
    assert parse_json('{"e\u0301": ["e\u0301", "\u212b"]}'.encode()) == {"\u00e9": ["\u00e9", "\u00c5"]}
    assert parse_json(b'["e\\u0301"]') == ["\u00e9"]


def test_lenient_replaces_what_cannot_be_stored() -> None:
    data = b'{"log": "a\\u0000b\\ud800", "e\\u0301": 1, "\\udfff": [null, "\\ud83d\\ude00"]}'
    assert parse_json(data, lenient=True) == {
        "log": "a\ufffdb\ufffd",
        "\u00e9": 1,
        "\ufffd": [None, "\U0001f600"],
    }
    with pytest.raises(Invalid) as caught:
        parse_json(b'{"a": "\\u0000", "n": 9223372036854775808}', lenient=True)
    assert [each.pointer for each in caught.value.errors] == ["/n"]


def test_lenient_keys_may_meet_without_an_error() -> None:
    keys = ",".join(f'"\\u{code:04x}": 1' for code in range(0xD800, 0xDFFF, 2))
    assert list(parse_json(b"{%b}" % keys.encode(), lenient=True)) == ["\ufffd"]


def test_many_keys_with_one_twice_at_the_end_take_linear_time() -> None:
    keys = ",".join(f'"{number}":1' for number in range(200_000))
    assert "more than once" in refused(b'{%b,"199999":1}' % keys.encode()).detail


def test_replace_bad_characters_changes_nothing_else() -> None:
    value = {"a\x00": ["\ud800x", 1, None, {"k": ("\udfff",)}], "e\u0301": 1.5, 3: True}
    assert replace_bad_characters(value) == {
        "a\ufffd": ["\ufffdx", 1, None, {"k": ["\ufffd"]}],
        "e\u0301": 1.5,
        3: True,
    }


def outcome(data: bytes, lenient: bool) -> Any:
    try:
        value = parse_json(data, lenient=lenient)
    except Problem as problem:
        value = problem
    if isinstance(value, Problem):
        assert value.status in (400, 422)
        assert len(value.errors) <= 100
        encode(value.document("/x", "1"))  # the answer itself can be written
    else:
        encode(value)
    return value


FRAGMENTS = st.sampled_from(
    [
        *rb'{ } [ ] " , : \ \u0000 \ud800 \udc00 1 - 1e999 NaN null true 0.5 "a":'.split(),
        b" ",
        b"\xff",
        b"\xef\xbb\xbf",
        b"e\xcc\x81",
        b"9" * 25,
        b"[" * 70,
    ]
)


@given(st.one_of(st.binary(), st.lists(FRAGMENTS).map(b"".join)), st.booleans())
def test_no_bytes_lead_to_any_other_exception(data: bytes, lenient: bool) -> None:
    outcome(data, lenient)


@given(TREES)
def test_what_is_accepted_is_storable_and_means_the_same(tree: Any) -> None:
    result = outcome(json.dumps(tree).encode(), lenient=False)
    if isinstance(result, Problem):
        return
    text = json.dumps(result, ensure_ascii=False)
    assert "\x00" not in text
    assert unicodedata.is_normalized("NFC", text) or not text.isascii()
    assert parse_json(text.encode()) == result
    if json.dumps(tree, ensure_ascii=False).isascii():
        assert result == tree
