"""`corral.schema.json_schema_validation`: schemas that are data."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from tests.kernel.schema.cases import TREES

from corral.errors import Invalid
from corral.schema.json_schema_validation import check_user_schema, json_schema_errors


def codes(document: dict[str, Any], value: Any) -> list[tuple[str, str]]:
    return [(each.pointer, each.code) for each in json_schema_errors(document, value)]


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
        assert "s3cret" not in json_schema_errors(document, "s3cret")[0].detail


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
        json_schema_errors(document, tree)


def test_a_fixed_value_beside_an_object_is_told_with_the_object() -> None:
    schema = {"items": {"anyOf": [{"type": "object"}, {"enum": ["*"]}]}}
    (fault,) = json_schema_errors(schema, ["gpt-4"])
    assert (fault.pointer, fault.detail) == ("/0", "one of *, or an object")
