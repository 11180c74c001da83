"""Shapes: bytes <-> JSON <-> types <-> JSON Schema.

Bytes of clients go through `parse_json` (one strict parser), then through `convert` into a `msgspec.Struct`; what is
wrong becomes one `Problem` that lists every fault. Importing `jsonschema` takes 0.1 s: it waits for the first need.
"""

from __future__ import annotations

import json
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from enum import EnumMeta
from functools import cache, cached_property, lru_cache
from importlib import import_module
from itertools import accumulate, islice
from math import inf, isfinite
from typing import Annotated, Any, Literal, NoReturn, TypeVar, overload
from unicodedata import is_normalized, normalize
from urllib.parse import unquote

import msgspec
from msgspec import Meta

from corral.errors import Fault, Invalid, Malformed

T = TypeVar("T")

# --- Types for the fields of shapes -----------------------------------------------------------------------------------

# For Python and ECMA alike. In Python `$` lets a trailing newline pass, so the end is "no character follows".
LINE = r"^[^\u0000-\u001f\u007f-\u009f\u2028\u2029]*(?![\s\S])"
SLUG = r"^[a-z0-9][a-z0-9_-]{0,63}(?![\s\S])"
UUID = r"^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}(?![\s\S])"


def line(max_length: int, min_length: int = 1) -> Meta:
    """One line of text without control characters: `Annotated[str, line(80)]`."""
    return Meta(min_length=min_length or None, max_length=max_length, pattern=LINE)


Name = Annotated[str, line(100)]
Title = Annotated[str, line(200)]
ShortText = Annotated[str, line(500, 0)]
Text = Annotated[str, Meta(max_length=65536)]
Slug = Annotated[str, Meta(pattern=SLUG)]
Id = Annotated[str, Meta(pattern=UUID, extra_json_schema={"format": "uuid"})]
Instant = Annotated[str, Meta(extra_json_schema={"format": "date-time"})]  # output only
MomentIn = Annotated[datetime, Meta(tz=True)]  # input only
Tags = Annotated[list[Annotated[str, line(64)]], Meta(max_length=20)]


def trimmed(text: str) -> str:
    """The text without white space around it, for the few fields that are trimmed."""
    return text.strip()


# --- Bytes -> JSON ----------------------------------------------------------------------------------------------------

MAX_DEPTH, MAX_INTEGER, MAX_FAULTS = 64, 2**63 - 1, 100
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\x00\x00")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class _RefusedError(Exception):
    """Something in the value must be refused; the slow path tells everything."""


def _deep(data: bytes, limit: int = MAX_DEPTH) -> bool:
    """Whether brackets outside strings nest deeper than `limit`; escapes go first, so each quote opens or closes."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    outside = b"".join(data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    steps = outside.translate(_STEPS, _NO_BRACKETS)
    return any(depth > limit for depth in accumulate(map((-1, 1).__getitem__, steps)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                _twice(name)
            seen.add(name)
    return found


def _twice(name: str) -> NoReturn:
    raise Malformed(f"The key {_shown(name)!r} appears more than once in one object.", code="malformed_json")


def _constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not JSON; use null or a finite number.", code="malformed_json")


def _integer(digits: str) -> int:
    if len(digits) > 18 and (len(digits) > 20 or abs(int(digits)) > MAX_INTEGER):
        raise _RefusedError
    return int(digits)


def _real(digits: str) -> float:
    if not isfinite(number := float(digits)):
        raise _RefusedError
    return number


_quick = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_real)
# This one keeps what is out of range: 25 characters of a huge integer are still out of range, with its sign.
_patient = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=lambda text: int(text[:25]))


def parse_json(data: bytes, *, lenient: bool = False) -> Any:
    """The value in `data`, strings in NFC; `Malformed` or `Invalid` for anything that is not clean JSON.

    `lenient` is for text that workers and agents report: characters that cannot be stored become U+FFFD.
    """
    if _deep(data):
        raise Malformed(f"The JSON nests deeper than {MAX_DEPTH} levels.", code="malformed_json")
    try:
        text = data.decode()
        if text.startswith("\ufeff"):
            raise Malformed("The JSON must not begin with a byte order mark.", code="malformed_json")
        try:
            value = _quick.decode(text)
            if data.isascii() and b"\\u" not in data:
                return value
            return _mapped(value, _replaced_nfc if lenient else _strict_nfc)
        except _RefusedError:
            value = _patient.decode(text)
            raise _invalid(_unstorable(replace_bad_characters(value) if lenient else value, "")) from None
    except UnicodeDecodeError as error:
        raise Malformed(f"Byte {error.start} of the body is not UTF-8.", code="malformed_json") from None
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at").removesuffix(" starting") if text.strip() else "the body is empty"
        where = f"line {error.lineno}, column {error.colno}"
        raise Malformed(f"Not JSON at {where}: {what}.", code="malformed_json") from None


def replace_bad_characters(value: Any) -> Any:
    """The value with U+FFFD for U+0000 and lone surrogates, in keys too."""
    return _mapped(value, _replaced)


def _replaced(text: str) -> str:
    return _UNSTORABLE.sub("\ufffd", text)


def _replaced_nfc(text: str) -> str:
    return normalize("NFC", _replaced(text))


def _strict_nfc(text: str) -> str:
    if _UNSTORABLE.search(text):
        raise _RefusedError
    return text if text.isascii() or is_normalized("NFC", text) else normalize("NFC", text)


def _mapped(value: Any, fix: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return fix(value)
    if isinstance(value, list | tuple):
        return [_mapped(item, fix) for item in value]
    if not isinstance(value, dict):
        return value
    result: dict[Any, Any] = {}
    for key, item in value.items():
        name = fix(key) if isinstance(key, str) else key
        if name in result and fix is _strict_nfc:  # two keys that differ in their normal form only
            _twice(name)
        result[name] = _mapped(item, fix)
    return result


def _unstorable(value: Any, pointer: str) -> Iterator[Fault]:
    """A fault for each string and number in the value that databases do not take."""
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            yield Fault(pointer, "bad_format", "text without U+0000 and lone surrogates")
    elif isinstance(value, int | float) and (not -MAX_INTEGER <= value <= MAX_INTEGER):
        if isinstance(value, int) or abs(value) == inf:
            bound = f"{MAX_INTEGER}" if isinstance(value, int) else "1.7976931348623157e308"
            most = value > 0
            detail = f"at most {bound}" if most else f"at least -{bound}"
            yield Fault(pointer, "too_large" if most else "too_small", detail)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unstorable(item, f"{pointer}/{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            there = pointer + _pointer([key])
            if _UNSTORABLE.search(key):
                yield Fault(there, "bad_format", "a key without U+0000 and lone surrogates")
            yield from _unstorable(item, there)


def _shown(text: str) -> str:
    return _replaced(text if len(text) <= 200 else text[:200] + "…")


def _pointer(path: Iterable[Any]) -> str:
    return "".join("/" + _shown(str(token)).replace("~", "~0").replace("/", "~1") for token in path)


def _invalid(faults: Iterable[Fault]) -> Invalid:
    found = tuple(islice(dict.fromkeys(faults), MAX_FAULTS + 1))
    if len(found) > MAX_FAULTS:
        return Invalid(f"More than {MAX_FAULTS} fields are not valid", errors=found[:MAX_FAULTS])
    return Invalid(f"{_count(len(found), 'field')} {'is' if len(found) == 1 else 'are'} not valid", errors=found)


# --- JSON <-> types ---------------------------------------------------------------------------------------------------

_encoder = msgspec.json.Encoder()


def encode(value: Any) -> bytes:
    """The JSON of an answer."""
    return _encoder.encode(value)


def components(kinds: Iterable[Any]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The schema of each type and the components they refer to, for OpenAPI 3.1."""
    kinds = tuple(kinds)
    schemas, named = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    orders = dict(_orders(kinds, set()))
    return [_ordered(each, orders) for each in schemas], {name: _ordered(each, orders) for name, each in named.items()}


@overload
def convert(kind: type[T], value: Any, *, strings: bool = False, pointer_prefix: str = "") -> T: ...
@overload
def convert(kind: Any, value: Any, *, strings: bool = False, pointer_prefix: str = "") -> Any: ...
def convert(kind: Any, value: Any, *, strings: bool = False, pointer_prefix: str = "") -> Any:
    """The value as a `kind`, or `Invalid` with every fault. With `strings` it comes from a query string or a path."""
    if strings:
        try:
            value = _shape(kind).read(_mapped(value, _strict_nfc))
        except _RefusedError:
            raise _invalid(_unstorable(value, pointer_prefix)) from None
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        told = str(error)
    validator = _shape(kind).validator
    faults = _all_faults(validator, value, pointer_prefix) if validator else ()
    raise _invalid(list(islice(faults, MAX_FAULTS + 1)) or [_told(told, pointer_prefix)])


def _told(message: str, prefix: str) -> Fault:
    """msgspec's own words, for what a JSON Schema cannot say (`__post_init__`, dates that do not exist)."""
    message, _, place = message.partition(" - at `")
    path = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", place)
    if message.startswith("Expected"):
        code = "bad_format" if "matching" in message or "timezone" in message else "wrong_type"
    else:
        code = "bad_format" if message.startswith("Invalid") else "not_allowed"
    return Fault(prefix + _pointer(name or index for name, index in path), code, message)


class _Shape:
    """What `convert` knows of one type beyond msgspec: its schema, a validator of it, what strings may become."""

    def __init__(self, kind: Any) -> None:
        try:
            self.schema: Any = _ordered(msgspec.json.schema(kind), dict(_orders((kind,), set())))
        except TypeError:  # a type that has no JSON Schema
            self.schema = None

    @cached_property
    def validator(self) -> Any:
        return self.schema and _validator(self.schema, strict_integers=True)

    def options(self, schema: Any) -> list[Any]:
        """The schema's alternatives, references followed."""
        while "$ref" in schema:
            schema = self.schema["$defs"][schema["$ref"].rpartition("/")[2]]
        return [each for one in schema["anyOf"] for each in self.options(one)] if "anyOf" in schema else [schema]

    def types(self, schema: Any) -> frozenset[str]:
        options = self.options(schema)
        named = {one["type"] for one in options if isinstance(one.get("type"), str)}
        return frozenset(named | {_JSON_TYPES[type(value)] for one in options for value in one.get("enum", ())})

    @cached_property
    def fields(self) -> dict[str | None, tuple[frozenset[str], frozenset[str]]]:
        """Field -> the JSON types of its value and of that value's items; `None` is the value as a whole."""
        options = self.options(self.schema or {})
        wanted: dict[str | None, Any] = {None: self.schema or {}}
        wanted.update((name, schema) for one in options for name, schema in one.get("properties", {}).items())
        items = {key: [one["items"] for one in self.options(each) if "items" in one] for key, each in wanted.items()}
        return {key: (self.types(each), self.types({"anyOf": items[key]})) for key, each in wanted.items()}

    def read(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self.read_one(item, self.fields.get(name)) for name, item in value.items()}
        return self.read_one(value, self.fields[None])

    def read_one(self, value: Any, wanted: tuple[frozenset[str], frozenset[str]] | None) -> Any:
        if wanted and isinstance(value, str) and "array" in wanted[0] and "string" not in wanted[0]:
            value = [value]
        if wanted and isinstance(value, list):
            return [_from_text(item, wanted[1]) for item in value]
        return _from_text(value, wanted[0]) if wanted else value


_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_shape = cache(_Shape)


def _from_text(text: Any, types: frozenset[str]) -> Any:
    if not isinstance(text, str) or "string" in types:
        return text
    if types & {"integer", "number"} and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    if "number" in types and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?([eE][+-]?[0-9]{1,2})?", text):
        return float(text)
    return {"true": True, "1": True, "false": False, "0": False}.get(text, text) if "boolean" in types else text


def _orders(kinds: Iterable[Any], seen: set[Any]) -> Iterator[tuple[frozenset[Any], list[Any]]]:
    """The values of each enumeration within the types, as declared; msgspec sorts them."""
    for kind in kinds:
        if isinstance(kind, EnumMeta):
            members = [member.value for member in typing.cast(Iterable[Any], kind)]
            yield frozenset(members), members
        elif typing.get_origin(kind) is Literal:
            yield frozenset(typing.get_args(kind)), list(typing.get_args(kind))
        elif args := typing.get_args(kind):
            yield from _orders((typing.get_origin(kind), *args), seen)
        elif isinstance(kind, type) and issubclass(kind, msgspec.Struct) and kind not in seen:
            seen.add(kind)
            yield from _orders((each.type for each in msgspec.structs.fields(kind)), seen)


def _ordered(schema: Any, orders: dict[frozenset[Any], list[Any]]) -> Any:
    if isinstance(schema, list):
        return [_ordered(each, orders) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _ordered(each, orders) for key, each in schema.items()}
    if isinstance(values := schema.get("enum"), list):
        result["enum"] = orders.get(frozenset(values), values)
    return result


# --- JSON Schema ------------------------------------------------------------------------------------------------------
_refs_left: ContextVar[list[int]] = ContextVar("refs_left")
_ACCEPTED = {LINE: "one line of text without control characters", UUID: "a UUID"}
_ACCEPTED[SLUG] = "1 to 64 of a-z, 0-9, - and _, beginning with a letter or digit"
_FORMATS = {"date-time": "a date and time with a zone, such as 2026-01-31T12:00:00Z", "uuid": "a UUID"}
_BOUNDS = {  # keyword -> code, words, unit
    "minLength": ("too_short", "at least", "character"),
    "maxLength": ("too_long", "at most", "character"),
    "minItems": ("too_short", "at least", "item"),
    "maxItems": ("too_long", "at most", "item"),
    "minContains": ("too_short", "at least", "matching item"),
    "maxContains": ("too_long", "at most", "matching item"),
    "minProperties": ("too_short", "at least", "field"),
    "maxProperties": ("too_long", "at most", "field"),
    "minimum": ("too_small", "at least", ""),
    "maximum": ("too_large", "at most", ""),
    "exclusiveMinimum": ("too_small", "more than", ""),
    "exclusiveMaximum": ("too_large", "less than", ""),
}


def json_schema_problems(schema: dict[str, Any], value: Any, *, pointer_prefix: str = "") -> list[Fault]:
    """What a schema that is data (`output_schema`, settings) finds wrong with the value; at most 100 faults."""
    from referencing.exceptions import Unresolvable

    _refs_left.set([20_000])  # recursive schemas can ask for endless work
    try:
        validator = _stored_validator(msgspec.json.encode(schema, order="sorted"))
        return list(islice(_all_faults(validator, value, pointer_prefix), MAX_FAULTS))
    except Unresolvable:
        return [Fault(pointer_prefix, "not_allowed", "the schema has a $ref to something outside itself")]
    except (_RefusedError, RecursionError):
        return [Fault(pointer_prefix, "not_allowed", "the schema follows too many $ref for this value")]


def check_user_schema(
    schema: dict[str, Any], *, max_bytes: int = 32768, max_depth: int = 16, pointer_prefix: str = ""
) -> None:
    """Raise `Invalid` unless users may store this JSON Schema: valid, small, without regexes or outward references."""
    if faults := list(islice(_unstorable(schema, pointer_prefix), MAX_FAULTS)):
        raise _invalid(faults)
    data = msgspec.json.encode(schema)
    if len(data) > max_bytes:
        raise Invalid.at(pointer_prefix, "too_long", f"at most {max_bytes} bytes of JSON")
    if _deep(data, max_depth):
        raise Invalid.at(pointer_prefix, "too_long", f"at most {max_depth} levels of nesting")
    if faults := list(_all_faults(_meta_validator(), schema, pointer_prefix)) or _forbidden(schema, pointer_prefix):
        raise _invalid(faults)


def _forbidden(schema: dict[str, Any], prefix: str) -> list[Fault]:
    known = dict(_subschemas(schema, ""))
    targets = {f"#{place}" for place in (*known, *(each["$anchor"] for each in known.values() if "$anchor" in each))}
    faults = []
    for pointer, each in known.items():
        for word in each.keys() & {"pattern", "patternProperties", "$dynamicRef", "$dynamicAnchor"}:
            faults.append(Fault(f"{prefix}{pointer}/{word}", "not_allowed", f"{word} is not taken in this schema"))
        if "$ref" in each and unquote(each["$ref"]) not in targets:
            detail = "a $ref to a schema within this one, such as #/$defs/name"
            faults.append(Fault(f"{prefix}{pointer}/$ref", "not_allowed", detail))
        if "$id" in each and pointer:
            faults.append(Fault(f"{prefix}{pointer}/$id", "not_allowed", "$id stands only at the top"))
        if each.get("$schema", _DIALECT).rstrip("#") != _DIALECT:
            faults.append(Fault(f"{prefix}{pointer}/$schema", "not_in_enum", f"one of {_DIALECT}"))
    return faults


_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NAMED = {"$defs", "definitions", "properties", "dependentSchemas", "patternProperties"}
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"}
_SINGLE |= {"unevaluatedItems", "unevaluatedProperties", "contentSchema"}


def _subschemas(schema: Any, pointer: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every place within a schema that holds a schema; names of properties and plain data are not such places."""
    if not isinstance(schema, dict):
        return
    yield pointer, schema
    for key, value in schema.items():
        there = pointer + _pointer([key])
        if key in _SINGLE:
            yield from _subschemas(value, there)
        elif key in _NAMED and isinstance(value, dict):
            for name, each in value.items():
                yield from _subschemas(each, there + _pointer([name]))
        elif key in _LISTS:
            for index, each in enumerate(value):
                yield from _subschemas(each, f"{there}/{index}")


@cache
def _validator_class(strict_integers: bool) -> Any:
    jsonschema: Any = import_module("jsonschema")  # as `Any`: it has no types
    base = jsonschema.Draft202012Validator

    def ref(validator: Any, target: str, value: Any, schema: Any) -> Iterator[Any]:
        left = _refs_left.get()
        left[0] -= 1
        if left[0] < 0:
            raise _RefusedError
        yield from base.VALIDATORS["$ref"](validator, target, value, schema)

    def unique(validator: Any, wanted: bool, value: Any, schema: Any) -> Iterator[Any]:  # the original is quadratic
        items = value if wanted and isinstance(value, list) else ()
        if len({json.dumps(item, sort_keys=True) for item in items}) < len(items):
            yield jsonschema.ValidationError("not unique")

    if not strict_integers:
        return jsonschema.validators.extend(base, {"$ref": ref, "uniqueItems": unique})
    whole = base.TYPE_CHECKER.redefine("integer", lambda _, value: isinstance(value, int) and value is not bool(value))
    return jsonschema.validators.extend(base, type_checker=whole)


def _validator(schema: Any, *, strict_integers: bool) -> Any:
    from referencing import Registry

    kind = _validator_class(strict_integers)
    jsonschema: Any = import_module("jsonschema")
    formats = [name for name in kind.FORMAT_CHECKER.checkers if name != "regex"]  # no compiling of foreign regexes
    return kind(schema, registry=Registry(), format_checker=jsonschema.FormatChecker(formats))


@lru_cache(maxsize=256)
def _stored_validator(schema: bytes) -> Any:
    document = msgspec.json.decode(schema)
    for _, each in list(_subschemas(document, "")):  # jsonschema forgets where a `false` stood
        for word in each.keys() & _NAMED:
            each[word] = {name: {"not": {}} if one is False else one for name, one in each[word].items()}
        for word in each.keys() & _LISTS:
            each[word] = [{"not": {}} if one is False else one for one in each[word]]
    return _validator(document, strict_integers=False)


@cache
def _meta_validator() -> Any:
    base: Any = import_module("jsonschema").Draft202012Validator
    return base(base.META_SCHEMA, registry=import_module("jsonschema_specifications").REGISTRY)


def _all_faults(validator: Any, value: Any, prefix: str) -> Iterator[Fault]:
    seen: set[tuple[str, str]] = set()
    for error in validator.iter_errors(value):
        for fault in _faults(error, prefix):
            if (fault.pointer, fault.code) not in seen:
                seen.add((fault.pointer, fault.code))
                yield fault


def _faults(error: Any, prefix: str) -> Iterator[Fault]:
    """One error of `jsonschema` in our words; its own would repeat the value, which may be a secret."""
    keyword, wanted, value, schema = error.validator, error.validator_value, error.instance, error.schema
    here = prefix + _pointer(error.absolute_path)
    if keyword == "required":
        for name in wanted:
            if name not in value:
                yield Fault(here + _pointer([name]), "required", "this field is required")
    elif keyword == "dependentRequired":
        for name in sorted({each for has, names in wanted.items() if has in value for each in names} - value.keys()):
            yield Fault(here + _pointer([name]), "required", "required together with another field")
    elif keyword == "additionalProperties":
        names = schema.get("properties", {})
        detail = f"no such field; known: {_listed(list(names))}" if names else "no such field; none is taken here"
        patterns = schema.get("patternProperties", ())
        for name in value:
            if name not in names and not any(re.search(each, name) for each in patterns):
                yield Fault(here + _pointer([name]), "unknown_field", detail)
    elif keyword in ("anyOf", "oneOf"):
        yield from _alternative_faults(error, here, prefix)
    else:
        yield Fault(here, *_code_and_words(keyword, wanted))


def _code_and_words(keyword: str | None, wanted: Any) -> tuple[str, str]:
    if keyword in _BOUNDS:
        code, words, unit = _BOUNDS[keyword]
        return code, f"{words} {_count(wanted, unit) if unit else wanted}"
    if keyword == "type":
        return "wrong_type", _typed([wanted] if isinstance(wanted, str) else wanted)
    if keyword in ("enum", "const"):
        return "not_in_enum", f"one of {_listed(wanted if keyword == 'enum' else [wanted])}"
    if keyword == "pattern":
        return "bad_format", _ACCEPTED.get(wanted, f"text that matches {wanted}")
    if keyword == "format":
        return "bad_format", _FORMATS.get(wanted, f"text in the format {wanted}")
    if keyword == "multipleOf":
        return "bad_format", f"a multiple of {wanted}"
    if keyword == "uniqueItems":
        return "not_unique", "no item twice"
    if keyword == "contains":
        return "too_short", "at least one item as the schema's `contains` says"
    if keyword == "unevaluatedProperties":
        return "unknown_field", "only fields that the schema names"
    return (
        "not_allowed",
        "nothing is taken here" if keyword is None or wanted == {} else f"not allowed by `{keyword}` of the schema",
    )


def _alternative_faults(error: Any, here: str, prefix: str) -> Iterator[Fault]:
    """The faults of the alternative that was meant: of the right type and tag, else with the fewest faults."""
    value, branches = error.instance, _branches(error)
    tags = error.schema.get("discriminator", {}).get("mapping", {})
    tag = error.schema["discriminator"]["propertyName"] if tags else ""
    if tags and isinstance(value, dict) and value.get(tag) not in list(tags):
        known = f"one of {_listed(list(tags))}"
        yield Fault(here + _pointer([tag]), "not_in_enum" if tag in value else "required", known)
    elif not branches:
        yield Fault(here, "not_allowed", "it fits more than one alternative of the schema")
    elif best := min((each for each in branches if not any(map(_wanted_types, each))), key=_distance, default=None):
        for inner in best:
            yield from _faults(inner, prefix)
    else:
        yield Fault(here, "wrong_type", _typed(list(dict.fromkeys(_wanted_types(error)))))


def _branches(error: Any) -> list[list[Any]]:
    branches: dict[int, list[Any]] = {}
    for each in error.context:
        branches.setdefault(each.relative_schema_path[0], []).append(each)
    return list(branches.values())


def _wanted_types(error: Any) -> list[str]:
    """The types that an error of an alternative wants instead of the value's own; none if the type is right."""
    if error.validator == "type" and not error.relative_path:
        return [error.validator_value] if isinstance(error.validator_value, str) else list(error.validator_value)
    if error.validator not in ("anyOf", "oneOf") or (error.parent is not None and error.relative_path):
        return []
    each = [[name for one in errors for name in _wanted_types(one)] for errors in _branches(error)]
    return [name for names in each for name in names] if all(each) else []


def _distance(errors: list[Any]) -> tuple[bool, int]:
    tagged = any(each.validator in ("enum", "const") and len(each.relative_path) == 1 for each in errors)
    return tagged, len(errors)


def _typed(names: Sequence[str]) -> str:
    articles = {"null": "null", "integer": "an integer", "array": "an array", "object": "an object"}
    return "must be " + " or ".join(articles.get(name, f"a {name}") for name in names)


def _listed(values: Sequence[Any]) -> str:
    words = [each if isinstance(each, str) else encode(each).decode() for each in values[:30]]
    return ", ".join(words) + (", …" if len(values) > 30 else "")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"
