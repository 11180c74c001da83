"""`corral.schema.conversion`: conversion with every fault, and encoding."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.kernel.schema.cases import ID, TREES, Order, Priority, Query, Square, faults

from corral.errors import FieldError, Invalid
from corral.schema import fields as schema_fields
from corral.schema.conversion import convert, encode
from corral.schema.fields import Id, Instant, Tags


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
        FieldError("/title", "required", "this field is required"),
        FieldError("/priority", "not_in_enum", "one of critical, high, low, medium"),
        FieldError("/level", "not_in_enum", "one of critical, high, low"),
        FieldError("/count", "too_small", "at least 1"),
        FieldError("/due", "bad_format", "a date and time with a zone, such as 2026-01-31T12:00:00Z"),
        FieldError("/tags/0", "too_short", "at least 1 character"),
        FieldError("/tags/1", "bad_format", "one line of text without control characters"),
        FieldError(
            "/z",
            "unknown_field",
            "unknown field; known fields: title, priority, level, count, due, tags, shape, numbers, parts",
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
    assert caught.value.errors == (FieldError("/items/1", "not_allowed", "a must not be over b"),)
    assert faults(Opaque, {}) == [("", "wrong_type")]


def test_strings_of_a_query() -> None:
    value = {"limit": "5", "ratio": "0.5", "urgent": "true", "status": ["open", "done"], "q": "5"}
    query = convert(Query, value, strings=True)
    assert query == Query(limit=5, ratio=0.5, urgent=True, status=["open", "done"], q="5")
    assert convert(Query, {"urgent": "0", "ratio": "3"}, strings=True) == Query(urgent=False, ratio=3.0)
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


class View(msgspec.Struct, kw_only=True):
    id: Id
    created_at: Instant
    priority: Priority


def test_encode() -> None:
    view = View(id=ID, created_at="2026-01-01T00:00:00.000Z", priority=Priority.LOW)
    assert json.loads(encode(view)) == {"id": ID, "created_at": "2026-01-01T00:00:00.000Z", "priority": "low"}


def test_jsonschema_is_not_imported_until_it_is_needed() -> None:
    code = (
        "import sys, msgspec\n"
        "from corral.schema.conversion import convert; from corral.schema.strict_json import parse_json\n"
        "convert(list[int], parse_json(b'[1]'))\n"
        "convert(msgspec.defstruct('Query', [('limit', int)]), {'limit': '1'}, strings=True)\n"
        "sys.exit('jsonschema' in sys.modules or 'referencing' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": schema_fields.__file__.rsplit("/", 3)[0]}
    )
