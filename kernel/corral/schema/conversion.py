"""Conversion between JSON and Python types. An invalid value raises one `Invalid` that lists every error."""

from __future__ import annotations

import re
from functools import cache, cached_property
from itertools import islice
from typing import Any, TypeVar, overload

import msgspec

from corral.errors import FieldError
from corral.schema.json_schema_validation import all_faults, validator_of
from corral.schema.strict_json import (
    MAX_FAULTS,
    RefusedText,
    invalid_problem,
    map_strings,
    pointer_of,
    strict_nfc,
    unstorable_faults,
)

T = TypeVar("T")

_encoder = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """Encode a response as JSON."""
    return _encoder.encode(value)


@overload
def convert(kind: type[T], value: Any, *, strings: bool = False, pointer_prefix: str = "") -> T: ...
@overload
def convert(kind: Any, value: Any, *, strings: bool = False, pointer_prefix: str = "") -> Any: ...
def convert(kind: Any, value: Any, *, strings: bool = False, pointer_prefix: str = "") -> Any:
    """Convert the value to the type `kind`, or raise an `Invalid` that lists every error.

    Set `strings` for a parsed query string, whose values are all strings.
    """
    if strings:
        try:
            value = _shape(kind).convert_query(map_strings(value, strict_nfc))
        except RefusedText:
            raise invalid_problem(unstorable_faults(value, pointer_prefix)) from None
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message = str(error)
    validator = _shape(kind).validator
    faults = all_faults(validator, value, pointer_prefix) if validator else ()
    raise invalid_problem(list(islice(faults, MAX_FAULTS + 1)) or [_fault_of(message, pointer_prefix)])


def _fault_of(message: str, prefix: str) -> FieldError:
    """Return the field error for an error that msgspec finds but JSON Schema cannot express.

    An error that `__post_init__` raises is an example.
    """
    message, _, place = message.partition(" - at `")
    path = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", place)
    if message.startswith("Expected"):
        code = "bad_format" if "matching" in message or "timezone" in message else "wrong_type"
    else:
        code = "bad_format" if message.startswith("Invalid") else "not_allowed"
    return FieldError(prefix + pointer_of(name or index for name, index in path), code, message)


class _Shape:
    """The JSON Schema of a type, its validator, and a method that converts strings to the types in the schema."""

    def __init__(self, kind: Any) -> None:
        try:
            self.schema: Any = msgspec.json.schema(kind)
        except TypeError:  # a type without a JSON Schema
            self.schema = None

    @cached_property
    def validator(self) -> Any:
        return self.schema and validator_of(self.schema, strict_integers=True)

    def alternatives(self, schema: Any) -> list[Any]:
        """Return the alternatives in the schema, with references resolved."""
        while "$ref" in schema:
            schema = self.schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return [each for one in schema["anyOf"] for each in self.alternatives(one)] if "anyOf" in schema else [schema]

    def json_types(self, schema: Any) -> frozenset[str]:
        """Return the JSON types that the schema allows, including the types of array items."""
        options = self.alternatives(schema)
        named = {one["type"] for one in options if isinstance(one.get("type"), str)}
        named |= {_JSON_TYPES[type(value)] for one in options for value in one.get("enum", ())}
        return frozenset(named).union(*(self.json_types(one["items"]) for one in options if "items" in one))

    @cached_property
    def field_types(self) -> dict[str, frozenset[str]]:
        """The JSON types of each field, keyed by field name."""
        options = self.alternatives(self.schema or {})
        return {name: self.json_types(each) for one in options for name, each in one.get("properties", {}).items()}

    def convert_query(self, query: dict[str, Any]) -> dict[str, Any]:
        """Convert the strings in a parsed query string to the types that the schema declares."""
        return {name: _from_text(item, self.field_types.get(name, frozenset())) for name, item in query.items()}


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_shape = cache(_Shape)


def _from_text(text: Any, types: frozenset[str]) -> Any:
    if isinstance(text, list):
        return [_from_text(item, types) for item in text]
    if not isinstance(text, str) or "string" in types:
        return text
    if types & {"integer", "number"} and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if "number" in types and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?", text):
        return float(text)
    return {"true": True, "1": True, "false": False, "0": False}.get(text, text) if "boolean" in types else text
