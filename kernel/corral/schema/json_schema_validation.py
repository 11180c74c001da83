"""Validation against JSON Schemas that users store, and conversion of validation errors to `FieldError` objects.

Importing `jsonschema` takes 0.1 s, so it is imported on first use.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache, lru_cache
from importlib import import_module
from itertools import groupby, islice
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import msgspec

from corral.errors import FieldError, Invalid
from corral.schema.fields import LINE, UUID
from corral.schema.strict_json import (
    MAX_FAULTS,
    RefusedText,
    count_of,
    invalid_problem,
    is_deeper,
    pointer_of,
    unstorable_faults,
)

MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH = 32 * 1024, 16
_refs_left: ContextVar[list[int]] = ContextVar("refs_left")
_ACCEPTED = {LINE: "one line of text without control characters", UUID: "a UUID"}
_FORMATS = {"date-time": "a date and time with a zone, such as 2026-01-31T12:00:00Z", "uuid": "a UUID"}
_BY_KEYWORD = json.loads(Path(__file__).with_name("faults.json").read_bytes())
"""The code and the text of the error for each JSON Schema keyword that a value can violate.

In `detail`, `{}` stands for the keyword's value and unit.
"""


def json_schema_errors(schema: dict[str, Any], value: Any, *, pointer_prefix: str = "") -> list[FieldError]:
    """Validate a value against a stored schema, and return at most 100 errors."""
    from referencing.exceptions import Unresolvable

    _refs_left.set([20_000])  # limits recursive schemas, which could otherwise run forever
    try:
        validator = _stored_validator(msgspec.json.encode(schema, order="sorted"))
        return list(islice(all_faults(validator, value, pointer_prefix), MAX_FAULTS))
    except Unresolvable:
        return [FieldError(pointer_prefix, "not_allowed", "the schema contains a $ref to another document")]
    except (RefusedText, RecursionError):
        return [FieldError(pointer_prefix, "not_allowed", "the schema follows too many references for this value")]


def check_user_schema(schema: dict[str, Any], *, pointer_prefix: str = "") -> None:
    """Raise `Invalid` unless the JSON Schema is valid, small, and free of patterns and external references."""
    if faults := list(islice(unstorable_faults(schema, pointer_prefix), MAX_FAULTS)):
        raise invalid_problem(faults)
    data = msgspec.json.encode(schema)
    if len(data) > MAX_SCHEMA_BYTES:
        raise Invalid.at(pointer_prefix, "too_long", f"at most {MAX_SCHEMA_BYTES} bytes of JSON")
    if is_deeper(data, MAX_SCHEMA_DEPTH):
        raise Invalid.at(pointer_prefix, "too_long", f"at most {MAX_SCHEMA_DEPTH} levels of nesting")
    if faults := list(all_faults(_meta_validator(), schema, pointer_prefix)) or _forbidden(schema, pointer_prefix):
        raise invalid_problem(faults)


def _forbidden(schema: dict[str, Any], prefix: str) -> list[FieldError]:
    known = dict(_subschemas(schema, ""))
    targets = {f"#{place}" for place in (*known, *(each["$anchor"] for each in known.values() if "$anchor" in each))}
    faults = []
    for pointer, each in known.items():
        words = each.keys() & {"pattern", "patternProperties", "$dynamicRef", "$dynamicAnchor"}
        refused = {word: f"{word} is not supported in this schema" for word in words}
        if "$ref" in each and unquote(each["$ref"]) not in targets:
            refused["$ref"] = "a $ref must refer to a schema within this one, such as #/$defs/name"
        if "$id" in each and pointer:
            refused["$id"] = "$id is only allowed at the top level"
        faults += [FieldError(f"{prefix}{pointer}/{word}", "not_allowed", why) for word, why in refused.items()]
        if each.get("$schema", _DIALECT).rstrip("#") != _DIALECT:
            faults.append(FieldError(f"{prefix}{pointer}/$schema", "not_in_enum", f"one of {_DIALECT}"))
    return faults


_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NAMED = {"$defs", "definitions", "properties", "dependentSchemas", "patternProperties"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
_SINGLE |= {"unevaluatedItems", "unevaluatedProperties", "contentSchema"}


def _subschemas(schema: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every subschema with its JSON pointer, including the schema itself."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for key, value in schema.items():
        there = pointer + pointer_of([key])
        if key in _SINGLE:
            yield from _subschemas(value, there)
        elif key in _NAMED and isinstance(value, dict):
            for name, each in value.items():
                yield from _subschemas(each, there + pointer_of([name]))
        elif key in _LISTS:
            for index, each in enumerate(value):
                yield from _subschemas(each, f"{there}/{index}")


@cache
def _validator_class(strict_integers: bool) -> Any:
    jsonschema: Any = import_module("jsonschema")  # `Any`: it has no type hints
    base = jsonschema.Draft202012Validator

    def ref(validator: Any, target: str, value: Any, schema: Any) -> Iterator[Any]:
        left = _refs_left.get()
        left[0] -= 1
        if left[0] < 0:
            raise RefusedText
        yield from base.VALIDATORS["$ref"](validator, target, value, schema)

    def unique(validator: Any, wanted: bool, value: Any, schema: Any) -> Iterator[Any]:  # the original is quadratic
        items = value if wanted and isinstance(value, list) else ()
        if len({json.dumps(item, sort_keys=True) for item in items}) < len(items):
            yield jsonschema.ValidationError("the items are not unique")

    if not strict_integers:
        return jsonschema.validators.extend(base, {"$ref": ref, "uniqueItems": unique})
    whole = base.TYPE_CHECKER.redefine("integer", lambda _, value: isinstance(value, int) and value is not bool(value))
    return jsonschema.validators.extend(base, type_checker=whole)


def validator_of(schema: Any, *, strict_integers: bool) -> Any:
    from referencing import Registry

    kind = _validator_class(strict_integers)
    jsonschema: Any = import_module("jsonschema")
    formats = [name for name in kind.FORMAT_CHECKER.checkers if name != "regex"]  # never compiles a user's expression
    return kind(schema, registry=Registry(), format_checker=jsonschema.FormatChecker(formats))


@lru_cache(maxsize=256)
def _stored_validator(schema: bytes) -> Any:
    document = msgspec.json.decode(schema)
    for _, each in list(_subschemas(document, "")):  # jsonschema does not report where a `false` schema is
        for word in each.keys() & _NAMED:
            each[word] = {name: {"not": {}} if one is False else one for name, one in each[word].items()}
        for word in each.keys() & _LISTS:
            each[word] = [{"not": {}} if one is False else one for one in each[word]]
    return validator_of(document, strict_integers=False)


@cache
def _meta_validator() -> Any:
    base: Any = import_module("jsonschema").Draft202012Validator
    return base(base.META_SCHEMA)


def all_faults(validator: Any, value: Any, prefix: str) -> Iterator[FieldError]:
    seen: set[tuple[str, str]] = set()
    for error in validator.iter_errors(value):
        for fault in _faults(error, prefix):
            if (fault.pointer, fault.code) not in seen:
                seen.add((fault.pointer, fault.code))
                yield fault


def _faults(error: Any, prefix: str) -> Iterator[FieldError]:
    """Convert a `jsonschema` error to field errors.

    The message of the error is not used, because it contains the value, which may be a secret.
    """
    keyword, wanted, value, schema = error.validator, error.validator_value, error.instance, error.schema
    here = prefix + pointer_of(error.absolute_path)
    if keyword == "required":
        for name in wanted:
            if name not in value:
                yield FieldError(here + pointer_of([name]), "required", "this field is required")
    elif keyword == "dependentRequired":
        for name in sorted({each for has, names in wanted.items() if has in value for each in names} - value.keys()):
            yield FieldError(
                here + pointer_of([name]), "required", "this field is required together with another field"
            )
    elif keyword == "additionalProperties":
        names, patterns = schema.get("properties", {}), schema.get("patternProperties", ())
        detail = f"unknown field; known fields: {_join_values(list(names))}" if names else "no fields are allowed here"
        for name in value:
            if name not in names and not any(re.search(each, name) for each in patterns):
                yield FieldError(here + pointer_of([name]), "unknown_field", detail)
    elif keyword in ("anyOf", "oneOf"):
        yield from _alternative_faults(error, here, prefix)
    else:
        yield FieldError(here, *_code_and_message(keyword, wanted, schema))


def _code_and_message(keyword: str | None, wanted: Any, schema: Any) -> tuple[str, str]:
    if keyword in _BY_KEYWORD:
        fault = _BY_KEYWORD[keyword]
        return fault["code"], fault["detail"].format(count_of(wanted, fault["unit"]) if "unit" in fault else wanted)
    if keyword == "type":
        return "wrong_type", _type_message([wanted] if isinstance(wanted, str) else wanted)
    if keyword in ("enum", "const"):
        return "not_in_enum", f"one of {_join_values(wanted if keyword == 'enum' else [wanted])}"
    if keyword == "pattern":
        return "bad_format", _ACCEPTED.get(wanted) or schema.get("patternErrorMessage", f"text that matches {wanted}")
    if keyword == "format":
        return "bad_format", _FORMATS.get(wanted, f"text in the format {wanted}")
    is_never_valid = keyword is None or wanted == {}
    return "not_allowed", "no value is allowed here" if is_never_valid else f"not allowed by `{keyword}` of the schema"


def _alternative_faults(error: Any, here: str, prefix: str) -> Iterator[FieldError]:
    """Yield the errors for the `anyOf` or `oneOf` alternative that the client most likely meant.

    Only alternatives that allow the type of the value are considered. Alternatives whose tag field has the right value
    are preferred. If several remain, the alternative with the fewest errors is chosen.
    """
    value, branches = error.instance, _branches(error)
    tags = error.schema.get("discriminator", {}).get("mapping", {})
    tag = error.schema["discriminator"]["propertyName"] if tags else ""
    if tags and isinstance(value, dict) and value.get(tag) not in list(tags):
        known = f"one of {_join_values(list(tags))}"
        yield FieldError(here + pointer_of([tag]), "not_in_enum" if tag in value else "required", known)
    elif not branches:
        yield FieldError(here, "not_allowed", "the value matches more than one alternative of the schema")
    elif best := min((each for each in branches if not any(map(_wanted_types, each))), key=_mismatch_key, default=None):
        others = [name for each in branches for inner in each for name in _wanted_types(inner) if name != "null"]
        if others and best[0].validator in ("enum", "const") and not best[0].relative_path:
            code, words = _code_and_message(best[0].validator, best[0].validator_value, best[0].schema)
            yield FieldError(here, code, f"{words}, or {_type_message(others).removeprefix('must be ')}")
            return
        for inner in best:
            yield from _faults(inner, prefix)
    else:
        yield FieldError(here, "wrong_type", _type_message(list(dict.fromkeys(_wanted_types(error)))))


def _branches(error: Any) -> list[list[Any]]:
    """Return the errors of each alternative that the value violates. jsonschema reports them one by one, in order."""
    return [list(errors) for _, errors in groupby(error.context, lambda each: each.relative_schema_path[0])]


def _wanted_types(error: Any) -> list[str]:
    """Return the JSON types that the value should have, or an empty list if the error is not about its type."""
    if error.validator == "type" and not error.relative_path:
        return [error.validator_value] if isinstance(error.validator_value, str) else list(error.validator_value)
    if error.validator not in ("anyOf", "oneOf") or (error.parent is not None and error.relative_path):
        return []
    each = [[name for one in errors for name in _wanted_types(one)] for errors in _branches(error)]
    return [name for names in each for name in names] if all(each) else []


def _mismatch_key(errors: list[Any]) -> tuple[bool, int]:
    tagged = any(each.validator in ("enum", "const") and len(each.relative_path) == 1 for each in errors)
    return tagged, len(errors)


def _type_message(names: Sequence[str]) -> str:
    articles = {"null": "null", "integer": "an integer", "array": "an array", "object": "an object"}
    return "must be " + (" or ".join(articles.get(name, f"a {name}") for name in names) or "of another type")


def _join_values(values: Sequence[Any]) -> str:
    words = [each if isinstance(each, str) else msgspec.json.encode(each).decode() for each in values[:30]]
    return ", ".join(words) + (", …" if len(values) > 30 else "")
