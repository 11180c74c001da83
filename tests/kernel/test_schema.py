"""`corral.schema`: the strict parser, conversion with every fault, schemas that are data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Meta, UnsetType

from corral.errors import Fault, Invalid, Malformed, Problem
from corral.schema import fields as schema_fields
from corral.schema.data import check_user_schema, json_schema_problems
from corral.schema.fields import Id, Instant, MomentIn, Name, ShortText, Slug, Tags, Text, Title, line, trimmed
from corral.schema.shapes import components, convert, encode
from corral.schema.strict_json import parse_json, replace_bad_characters


class Priority(Enum):
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


class Circle(msgspec.Struct, tag="circle", kw_only=True, forbid_unknown_fields=True):
    radius: Annotated[int, Meta(ge=1)]


class Square(msgspec.Struct, tag="square", kw_only=True, forbid_unknown_fields=True):
    side: int


class Order(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    title: Title
    priority: Priority = Priority.MEDIUM
    level: Literal["low", "high", "critical"] | None = None
    count: Annotated[int, Meta(ge=1, le=200)] = 50
    due: MomentIn | UnsetType | None = UNSET
    tags: Tags = []
    shape: Circle | Square | None = None
    numbers: dict[str, int] = {}
    parts: list[Order] = []


class Query(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    ratio: float | None = None
    urgent: bool | None = None
    status: list[Literal["open", "done"]] = []
    since: MomentIn | None = None
    q: Title | None = None


def faults(kind: Any, value: Any, **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(Invalid) as caught:
        convert(kind, value, **options)
    assert caught.value.status == 422
    return [(each.pointer, each.code) for each in caught.value.errors]


def refused(data: bytes) -> Problem:
    with pytest.raises(Problem) as caught:
        parse_json(data)
    return caught.value


# --- parse_json -------------------------------------------------------------------------------------------------------


def test_plain_json_is_parsed() -> None:
    assert parse_json(b' {"a": [1, -2.5, true, null, "x"], "b": {}} ') == {
        "a": [1, -2.5, True, None, "x"],
        "b": {},
    }


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


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(st.characters()), inner, max_size=5),
)


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


# --- convert ----------------------------------------------------------------------------------------------------------


def test_every_fault_is_told_at_once() -> None:
    value = {
        "priority": "urgent",
        "level": "x",
        "count": 0,
        "due": "2026-01-01T00:00:00",
        "tags": ["", "a\n", "b"],
        "z": 1,
    }
    with pytest.raises(Invalid) as caught:
        convert(Order, value)
    assert set(caught.value.errors) == {
        Fault("/title", "required", "this field is required"),
        Fault("/priority", "not_in_enum", "one of low, medium, high, critical"),
        Fault("/level", "not_in_enum", "one of low, high, critical"),
        Fault("/count", "too_small", "at least 1"),
        Fault("/due", "bad_format", "a date and time with a zone, such as 2026-01-31T12:00:00Z"),
        Fault("/tags/0", "too_short", "at least 1 character"),
        Fault("/tags/1", "bad_format", "one line of text without control characters"),
        Fault(
            "/z",
            "unknown_field",
            "no such field; known: title, priority, level, count, due, tags, shape, numbers, parts",
        ),
    }
    assert caught.value.detail == "8 fields are not valid"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"title": 5}, ("/title", "wrong_type")),
        ({"title": None}, ("/title", "wrong_type")),
        ({"title": "x" * 201}, ("/title", "too_long")),
        ({"count": 201}, ("/count", "too_large")),
        ({"count": True}, ("/count", "wrong_type")),
        ({"count": 1.0}, ("/count", "wrong_type")),
        ({"count": "5"}, ("/count", "wrong_type")),
        ({"due": 5}, ("/due", "wrong_type")),
        ({"due": "2026-02-30T00:00:00Z"}, ("/due", "bad_format")),
        ({"tags": ["a"] * 21}, ("/tags", "too_long")),
        ({"tags": "a"}, ("/tags", "wrong_type")),
        ({"numbers": {"a/b~": "x"}}, ("/numbers/a~1b~0", "wrong_type")),
        ({"shape": {"type": "circle", "radius": 0}}, ("/shape/radius", "too_small")),
        ({"shape": {"type": "circle"}}, ("/shape/radius", "required")),
        ({"shape": {"type": "square", "side": 1, "x": 1}}, ("/shape/x", "unknown_field")),
        ({"shape": 5}, ("/shape", "wrong_type")),
        ({"shape": {"side": 1}}, ("/shape/type", "required")),
        ({"shape": {"type": "oval"}}, ("/shape/type", "not_in_enum")),
        ({"parts": [{"title": "a", "parts": [{}]}]}, ("/parts/0/parts/0/title", "required")),
    ],
)
def test_one_fault(change: dict[str, Any], expected: tuple[str, str]) -> None:
    assert faults(Order, {"title": "a", **change}) == [expected]


def test_words_say_what_is_accepted() -> None:
    with pytest.raises(Invalid) as caught:
        convert(Order, {"title": "x" * 201, "shape": 5, "count": 201})
    details = {each.pointer: each.detail for each in caught.value.errors}
    assert details == {
        "/title": "at most 200 characters",
        "/shape": "must be an object or null",
        "/count": "at most 200",
    }


def test_valid_values_are_converted() -> None:
    order = convert(Order, {"title": "a", "due": "2026-01-01T00:00:00+02:00", "shape": {"type": "square", "side": 2}})
    assert isinstance(order.due, datetime)
    assert order.due.utcoffset() is not None
    assert order.shape == Square(side=2)
    assert convert(int, 5) == 5
    assert convert(list[int], [1]) == [1]


def test_faults_are_at_most_100_and_the_whole_value_may_be_wrong() -> None:
    assert len(faults(list[int], ["x"] * 100_000)) == 100
    assert faults(Order, []) == [("", "wrong_type")]
    assert faults(Order, {"title": "a", "\x00/~": 1}) == [("/\ufffd~1~0", "unknown_field")]


class Paired(msgspec.Struct, kw_only=True):
    a: int
    b: int

    def __post_init__(self) -> None:
        if self.a > self.b:
            raise ValueError("a must not be over b")


class Opaque:
    pass


def test_what_a_schema_cannot_say_comes_from_msgspec() -> None:
    with pytest.raises(Invalid) as caught:
        convert(dict[str, list[Paired]], {"x": [{"a": 2, "b": 1}]})
    assert caught.value.errors[0].detail == "a must not be over b"
    with pytest.raises(Invalid) as caught:
        convert(list[Paired], [{"a": 1, "b": 1}, {"a": 2, "b": 1}], pointer_prefix="/items")
    assert caught.value.errors == (Fault("/items/1", "not_allowed", "a must not be over b"),)
    assert faults(Opaque, {}) == [("", "wrong_type")]


def test_strings_of_a_query() -> None:
    value = {"limit": "5", "ratio": "0.5", "urgent": "true", "status": ["open", "done"], "q": "5"}
    query = convert(Query, value, strings=True)
    assert query == Query(limit=5, ratio=0.5, urgent=True, status=["open", "done"], q="5")
    assert convert(Query, {"status": "open", "urgent": "0", "ratio": "3"}, strings=True).status == ["open"]
    assert convert(int, "7", strings=True) == 7
    assert convert(Query, {"q": "e\u0301"}, strings=True).q == "\u00e9"


def test_faults_of_a_query() -> None:
    value = {"limit": "0", "ratio": "nan", "urgent": "yes", "status": ["open", "x"], "since": "1700000000", "page": "1"}
    assert sorted(faults(Query, value, strings=True, pointer_prefix="/query")) == [
        ("/query/limit", "too_small"),
        ("/query/page", "unknown_field"),
        ("/query/ratio", "wrong_type"),
        ("/query/since", "bad_format"),
        ("/query/status/1", "not_in_enum"),
        ("/query/urgent", "wrong_type"),
    ]
    for text in ("", " 1", "1_0", "+1", "1.0", "1e1", "\u0663", "9" * 30, "9" * 5000, "null"):
        assert faults(Query, {"limit": text}, strings=True) == [("/limit", "wrong_type")]
    assert faults(Query, {"limit": ["1", "2"]}, strings=True) == [("/limit", "wrong_type")]
    assert faults(Query, {"q": "a\x00", "since": "\ud800"}, strings=True) == [
        ("/q", "bad_format"),
        ("/since", "bad_format"),
    ]


@given(TREES, st.booleans())
def test_convert_gives_a_value_or_invalid(tree: Any, strings: bool) -> None:
    for kind in (Order, Query, Tags, Id):
        try:
            convert(kind, {"title": tree, "shape": tree, "numbers": tree, "status": tree}, strings=strings)
            convert(kind, tree, strings=strings)
        except Invalid as problem:
            encode(problem.document("/x", "1"))


# --- types of fields --------------------------------------------------------------------------------------------------

ID = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Name, ["a", "\u00e9" * 100, " x "], ["", "a" * 101, "a\n", "\n", "a\tb", "\x7f", "\x85", "\u2028", "a\u2029"]),
        (Title, ["a" * 200], ["", "a" * 201, "a\r\nb"]),
        (ShortText, ["", "a" * 500], ["a" * 501, "a\n"]),
        (Text, ["", "a\n\tb\x1b", "\u00e9" * 65536], ["a" * 65537]),
        (Slug, ["a", "0-_z", "a" * 64], ["", "A", "-a", "a\n", "a" * 65, "\u00e9"]),
        (Id, [ID, ID.upper()], ["", ID + "\n", ID[:-1], ID.replace("-", ""), "{" + ID + "}", "g" + ID[1:]]),
        (Tags, [[], ["a"] * 20, ["a" * 64]], [["a"] * 21, [""], ["a" * 65], ["a\n"]]),
        (Annotated[str, line(3)], ["abc"], ["abcd", "", "ab\n"]),
        (MomentIn, ["2026-01-01T00:00:00Z"], ["2026-01-01T00:00:00", "2026-01-01", "x", 5]),
    ],
)
def test_field_types(kind: Any, good: list[Any], bad: list[Any]) -> None:
    document = msgspec.json.schema(kind)
    for value in good:
        convert(kind, value)
        assert json_schema_problems(document, value) == []
    for value in bad:
        assert len(faults(kind, value)) == 1
        assert json_schema_problems(document, value)


def test_trimmed() -> None:
    assert trimmed(" \ta b\n") == "a b"


# --- encode, components -----------------------------------------------------------------------------------------------


class View(msgspec.Struct, kw_only=True):
    id: Id
    created_at: Instant
    priority: Priority


def test_encode() -> None:
    view = View(id=ID, created_at="2026-01-01T00:00:00.000Z", priority=Priority.LOW)
    assert json.loads(encode(view)) == {"id": ID, "created_at": "2026-01-01T00:00:00.000Z", "priority": "low"}


def test_components() -> None:
    schemas, named = components([Order, list[View]])
    assert schemas == [
        {"$ref": "#/components/schemas/Order"},
        {"type": "array", "items": {"$ref": "#/components/schemas/View"}},
    ]
    assert set(named) == {"Order", "View", "Circle", "Square", "Priority"}
    assert named["Priority"]["enum"] == ["low", "medium", "high", "critical"]
    assert named["View"]["properties"]["created_at"] == {"type": "string", "format": "date-time"}
    assert named["View"]["properties"]["id"]["format"] == "uuid"
    assert not re.search(r"\$defs", json.dumps(named))


def test_jsonschema_is_not_imported_until_it_is_needed() -> None:
    code = (
        "import sys; from corral.schema.shapes import convert; from corral.schema.strict_json import parse_json\n"
        "convert(list[int], parse_json(b'[1]'))\n"
        "convert(int, '1', strings=True); sys.exit('jsonschema' in sys.modules or 'referencing' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": schema_fields.__file__.rsplit("/", 3)[0]}
    )


# --- schemas that are data --------------------------------------------------------------------------------------------


def codes(document: dict[str, Any], value: Any) -> list[tuple[str, str]]:
    return [(each.pointer, each.code) for each in json_schema_problems(document, value)]


@pytest.mark.parametrize(
    ("document", "value", "expected"),
    [
        ({"type": "object", "required": ["a", "b"]}, {}, [("/a", "required"), ("/b", "required")]),
        ({"properties": {"a": {"type": ["string", "null"]}}}, {"a": 1}, [("/a", "wrong_type")]),
        ({"properties": {"a": {}}, "additionalProperties": False}, {"a": 1, "b": 2}, [("/b", "unknown_field")]),
        ({"properties": {"a": {}}, "unevaluatedProperties": False}, {"b": 2}, [("", "unknown_field")]),
        ({"dependentRequired": {"a": ["b"]}}, {"a": 1}, [("/b", "required")]),
        ({"const": 5}, 6, [("", "not_in_enum")]),
        ({"enum": [1, "a", None]}, 6, [("", "not_in_enum")]),
        ({"uniqueItems": True}, [{"a": 1}, {"a": 1}], [("", "not_unique")]),
        ({"minItems": 2}, [1], [("", "too_short")]),
        ({"maxProperties": 0}, {"a": 1}, [("", "too_long")]),
        ({"exclusiveMinimum": 1}, 1, [("", "too_small")]),
        ({"exclusiveMaximum": 1}, 1, [("", "too_large")]),
        ({"multipleOf": 2}, 3, [("", "bad_format")]),
        ({"format": "date-time"}, "2026-01-01", [("", "bad_format")]),
        ({"format": "email"}, "x", [("", "bad_format")]),
        ({"pattern": "^a"}, "b", [("", "bad_format")]),
        ({"not": {}}, 1, [("", "not_allowed")]),
        ({"properties": {"a": False}}, {"a": 1}, [("/a", "not_allowed")]),
        ({"contains": {"type": "string"}}, [1], [("", "too_short")]),
        ({"oneOf": [{}, {}]}, 1, [("", "not_allowed")]),
        ({"anyOf": [{"type": "string", "maxLength": 1}, {"type": "integer"}]}, "ab", [("", "too_long")]),
        ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, [], [("", "wrong_type")]),
        ({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, {"a": 1}, [("/b", "required")]),
        ({"type": "integer"}, 1.0, []),
    ],
)
def test_codes_of_data_schemas(document: dict[str, Any], value: Any, expected: list[tuple[str, str]]) -> None:
    assert codes(document, value) == expected


def test_values_are_never_repeated_in_the_words() -> None:
    documents: list[dict[str, Any]] = [
        {"type": "integer"},
        {"maxLength": 1},
        {"enum": ["a"]},
        {"not": {}},
        {"pattern": "^x"},
        {"const": 1},
    ]
    for document in documents:
        assert "s3cret" not in json_schema_problems(document, "s3cret")[0].detail


def test_references_never_leave_the_schema() -> None:
    for target in (
        "https://example.org/schema",
        "http://127.0.0.1:1/x",
        "file:///etc/passwd",
        "#/$defs/x",
    ):
        assert codes({"$ref": target}, 1) == [("", "not_allowed")]


def test_endless_references_end() -> None:
    assert codes({"$ref": "#"}, 1) == [("", "not_allowed")]
    doubling = {f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(40)}
    assert codes({"$ref": "#/$defs/a0", "$defs": {**doubling, "a40": {}}}, 1) == [("", "not_allowed")]


def test_recursive_schemas_and_changed_schemas_work() -> None:
    document: dict[str, Any] = {"properties": {"next": {"$ref": "#"}, "n": {"type": "integer"}}}
    value: dict[str, Any] = {"n": "x"}
    for _ in range(20):
        value = {"next": value}
    assert codes(document, value) == [("/next" * 20 + "/n", "wrong_type")]
    document["properties"]["n"] = {}
    assert codes(document, value) == []


def test_unique_items_take_linear_time() -> None:
    assert codes({"uniqueItems": True}, [{"a": n} for n in range(50_000)]) == []


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.org/x", "type": "object"},
        {"properties": {"pattern": {"type": "string"}, "$ref": {}, "patternProperties": {}}},
        {"const": {"$ref": "http://x", "pattern": "a"}, "examples": [{"pattern": 1}]},
        {
            "$defs": {"a/b~ c": {"$anchor": "here"}},
            "anyOf": [{"$ref": "#/$defs/a~1b~0%20c"}, {"$ref": "#here"}, {"$ref": "#"}],
        },
    ],
)
def test_user_schemas_that_are_taken(document: dict[str, Any]) -> None:
    check_user_schema(document)


def nested(depth: int) -> dict[str, Any]:
    return {"not": nested(depth - 1)} if depth > 1 else {}


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"type": "text"}, ("/type", "not_in_enum")),
        ({"properties": []}, ("/properties", "wrong_type")),
        ({"required": ["a", "a"]}, ("/required", "not_unique")),
        ([], ("", "wrong_type")),
        ({"description": "x" * 32768}, ("", "too_long")),
        (nested(17), ("", "too_long")),
        ({"items": {"pattern": "a"}}, ("/items/pattern", "not_allowed")),
        ({"patternProperties": {"a": {}}}, ("/patternProperties", "not_allowed")),
        ({"allOf": [{"$ref": "https://example.org/x"}]}, ("/allOf/0/$ref", "not_allowed")),
        ({"$ref": "other.json#/a"}, ("/$ref", "not_allowed")),
        ({"$ref": "#/$defs/none"}, ("/$ref", "not_allowed")),
        ({"const": {"pattern": "(a+)+$"}, "items": {"$ref": "#/const"}}, ("/items/$ref", "not_allowed")),
        ({"$dynamicRef": "#x"}, ("/$dynamicRef", "not_allowed")),
        ({"items": {"$id": "x"}}, ("/items/$id", "not_allowed")),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, ("/$schema", "not_in_enum")),
    ],
)
def test_user_schemas_that_are_refused(document: Any, expected: tuple[str, str]) -> None:
    with pytest.raises(Invalid) as caught:
        check_user_schema(document, pointer_prefix="/output_schema")
    assert ("/output_schema" + expected[0], expected[1]) in [(each.pointer, each.code) for each in caught.value.errors]


def test_user_schema_of_the_greatest_depth() -> None:
    check_user_schema(nested(16))


@given(TREES)
def test_a_user_schema_is_taken_or_invalid(tree: Any) -> None:
    for document in (
        tree,
        {"anyOf": tree},
        {"properties": {"a": tree}, "$ref": tree},
        {"$anchor": tree},
        {"type": tree},
    ):
        try:
            check_user_schema(document)
        except Invalid:
            continue
        json_schema_problems(document, tree)
