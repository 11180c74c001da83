"""The strict JSON parser for all client input."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, islice
from math import inf, isfinite
from typing import Any, NoReturn
from unicodedata import is_normalized, normalize

from corral.errors import FieldError, Invalid, Malformed

MAX_DEPTH, MAX_INTEGER, MAX_FAULTS = 64, 2**63 - 1, 100
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\x00\x00")
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class RefusedText(Exception):
    """Raised if a value contains invalid text or numbers. A slower second pass then finds every error."""


def is_deeper(data: bytes, limit: int = MAX_DEPTH) -> bool:
    """Return whether brackets outside of strings are nested deeper than `limit`. Escape sequences are removed first."""
    if data.count(b"[") + data.count(b"{") <= limit:
        return False
    outside = b"".join(data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    steps = outside.translate(_STEPS, _NO_BRACKETS)
    return any(depth > limit for depth in accumulate(map((-1, 1).__getitem__, steps)))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        _refuse_duplicate(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return found


def _refuse_duplicate(name: str) -> NoReturn:
    raise Malformed(f"The key {shortened(name)!r} appears more than once in one object.", code="malformed_json")


def _constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not JSON; use null or a finite number.", code="malformed_json")


def _integer(digits: str) -> int:
    if len(digits) > 18 and (len(digits) > 20 or abs(int(digits)) > MAX_INTEGER):
        raise RefusedText
    return int(digits)


def _float(digits: str) -> float:
    if not isfinite(number := float(digits)):
        raise RefusedText
    return number


_fast = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer, parse_float=_float)
# Accepts numbers that are out of range. The first 25 characters of a huge integer are still out of range, with its
# sign.
_lenient = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=lambda text: int(text[:25]))


def parse_json(data: bytes, *, lenient: bool = False) -> Any:
    """Parse JSON and normalise its strings to NFC. Raise `Malformed` or `Invalid` unless the data is valid strict JSON.

    With `lenient`, each character that the databases cannot store is replaced by U+FFFD. Routes that receive the output
    of agents set `lenient`.
    """
    if is_deeper(data):
        raise Malformed(f"The JSON nests deeper than {MAX_DEPTH} levels.", code="malformed_json")
    try:
        text = data.decode()
        if text.startswith("\ufeff"):
            raise Malformed("The JSON must not begin with a byte order mark.", code="malformed_json")
        try:
            value, end = _fast.raw_decode(text, len(text) - len(text.lstrip(" \t\n\r")))
            if text[end:].strip(" \t\n\r"):
                _fast.decode(text)  # raises the error; always calling it is slower, as it searches for white space
            fix = _replace_unstorable_nfc if lenient else strict_nfc
            return value if data.isascii() and b"\\u" not in data else map_strings(value, fix)
        except RefusedText:
            value = _lenient.decode(text)
            raise invalid_problem(unstorable_faults(replace_bad_characters(value) if lenient else value, "")) from None
    except UnicodeDecodeError as error:
        raise Malformed(f"Byte {error.start} of the body is not UTF-8.", code="malformed_json") from None
    except json.JSONDecodeError as error:
        reason = error.msg.removesuffix(" at").removesuffix(" starting") if text.strip() else "the body is empty"
        where = f"line {error.lineno}, column {error.colno}"
        raise Malformed(f"The body is not valid JSON at {where}: {reason}.", code="malformed_json") from None


def replace_bad_characters(value: Any) -> Any:
    """Return the value with U+0000 and lone surrogates replaced by U+FFFD, including in keys."""
    return map_strings(value, _replace_unstorable)


def _replace_unstorable(text: str) -> str:
    return _UNSTORABLE.sub("\ufffd", text)


def _replace_unstorable_nfc(text: str) -> str:
    return normalize("NFC", _replace_unstorable(text))


def strict_nfc(text: str) -> str:
    if _UNSTORABLE.search(text):
        raise RefusedText
    return text if text.isascii() or is_normalized("NFC", text) else normalize("NFC", text)


def map_strings(value: Any, fix: Callable[[str], str]) -> Any:
    """Return the JSON value with `fix` applied to all strings and keys.

    If two keys of an object become equal, the last item is kept. If `fix` is `strict_nfc`, raise `Malformed` instead.
    """
    if isinstance(value, str):
        return fix(value)
    if isinstance(value, list | tuple):
        return [map_strings(item, fix) for item in value]
    if not isinstance(value, dict | Mapping):  # the check of a dict is much faster
        return value
    result: dict[Any, Any] = {}
    for key, item in value.items():
        name = fix(key) if isinstance(key, str) else key
        if name in result and fix is strict_nfc:  # two keys have the same normal form
            _refuse_duplicate(name)
        result[name] = map_strings(item, fix)
    return result


def unstorable_faults(value: Any, pointer: str) -> Iterator[FieldError]:
    """Yield a field error for each string and number that the databases cannot store."""
    if isinstance(value, str):
        if _UNSTORABLE.search(value):
            yield FieldError(pointer, "bad_format", "must not contain U+0000 or lone surrogates")
    elif isinstance(value, int | float) and (not -MAX_INTEGER <= value <= MAX_INTEGER):
        if isinstance(value, int) or abs(value) == inf:
            bound = f"{MAX_INTEGER}" if isinstance(value, int) else "1.7976931348623157e308"
            code, detail = ("too_large", f"at most {bound}") if value > 0 else ("too_small", f"at least -{bound}")
            yield FieldError(pointer, code, detail)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from unstorable_faults(item, f"{pointer}/{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            there = pointer + pointer_of([key])
            if _UNSTORABLE.search(key):
                yield FieldError(there, "bad_format", "the key must not contain U+0000 or lone surrogates")
            yield from unstorable_faults(item, there)


def shortened(text: str) -> str:
    return _replace_unstorable(text if len(text) <= 200 else text[:200] + "…")


def pointer_of(path: Iterable[Any]) -> str:
    return "".join("/" + shortened(str(token)).replace("~", "~0").replace("/", "~1") for token in path)


def invalid_problem(faults: Iterable[FieldError]) -> Invalid:
    """Return the 422 problem that lists the field errors, up to `MAX_FAULTS` of them."""
    found = tuple(islice(dict.fromkeys(faults), MAX_FAULTS + 1))
    if len(found) > MAX_FAULTS:
        return Invalid(f"More than {MAX_FAULTS} fields are not valid", errors=found[:MAX_FAULTS])
    return Invalid(f"{count_of(len(found), 'field')} {'is' if len(found) == 1 else 'are'} not valid", errors=found)


def count_of(number: int, unit: str) -> str:
    """Return the number with the unit, such as `1 task` or `3 tasks`. The plural of `unit` ends with `s`."""
    return f"{number} {unit}{'' if number == 1 else 's'}"
