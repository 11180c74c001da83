"""Additional functions for expressions. They raise `ValueError` with a message for users.

Their arguments and results are JSON values, except that timestamps are `datetime` objects and durations are `timedelta`
objects.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import msgspec

MAX_TEXT = 256 * 1024  # characters of a text that a function makes
_PATH = re.compile(r"(?:^|\.)([^.\[\]]+)|\[(\d{1,9})\]")


def cel_functions(now: float) -> dict[str, Callable[..., Any]]:
    """Return the functions, keyed by name. `now` is the time that `now()` returns, in seconds since the epoch."""
    moment = datetime.fromtimestamp(now, UTC)

    def current_time() -> datetime:
        return moment

    return {**_FUNCTIONS, "now": current_time}


def size(value: Any) -> int:
    """Return the number of characters in a string, bytes in a byte string, items in a list, or keys in an object."""
    if not isinstance(value, str | list | dict | bytes):
        raise ValueError(f"size() needs a string, a list or an object, not {_kind(value)}")
    return len(value)


def string(value: Any) -> str:
    """Convert a value to text."""
    if isinstance(value, str):
        return value
    if isinstance(value, datetime):
        return timestamp_text(value)
    if isinstance(value, timedelta):
        return duration_text(value)
    return to_json(value) if value is not None else "null"


def get(value: Any, path: str, fallback: Any = None) -> Any:
    """Return the value at a path such as `a.b[0]`, or the fallback if the value is absent or null."""
    position = 0
    for match in _PATH.finditer(path):
        if match.start() != position:
            break
        position, key = match.end(), match[1]
        if key is not None:
            value = value.get(key) if isinstance(value, dict) else None
        else:
            index = int(match[2])
            value = value[index] if isinstance(value, list) and index < len(value) else None
        if value is None:
            return fallback
    if position != len(path):
        raise ValueError(f"get() cannot read the path {path!r}; write the path in the form a.b[0]")
    return fallback if value is None else value


def to_json(value: Any) -> str:
    """Encode a value as JSON text."""
    text = msgspec.json.encode(value).decode()
    _check_length(len(text))
    if "null" in text and not _is_finite(value):
        raise ValueError("the value contains a number that is not finite, for example the result of a division by zero")
    return text


def parse_json(text: str) -> Any:
    """Parse JSON text and return its value."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise ValueError("parse_json() needs valid JSON") from None


def split(text: str, separator: str) -> list[str]:
    """Split a string at each separator and return the parts."""
    if not separator:
        raise ValueError("split() needs a non-empty separator")
    return text.split(separator)


def join(items: list[Any], separator: str = "") -> str:
    """Concatenate the items as text, with a separator between them."""
    texts = [string(item) if item is not None else "" for item in items]
    _check_length(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def replace(text: str, old: str, new: str) -> str:
    """Return the text with every occurrence of `old` replaced by `new`."""
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def keys(value: dict[str, Any]) -> list[str]:
    """Return the keys of an object, sorted because the CEL library does not preserve their order."""
    return sorted(_require_object(value, "keys"))


def values(value: dict[str, Any]) -> list[Any]:
    """Return the values of an object, ordered by their keys."""
    return [item for _, item in sorted(_require_object(value, "values").items(), key=lambda pair: str(pair[0]))]


def total(items: list[Any]) -> Any:
    """Return the sum of a list of numbers, or 0 for an empty list."""
    if not all(_is_number(item) for item in items):
        raise ValueError("sum() needs a list of numbers")
    return sum(items)


def least(*items: Any) -> Any:
    """Return the smallest argument or, for a single list, its smallest item."""
    return min(_require_comparable(items, "min"))


def greatest(*items: Any) -> Any:
    """Return the largest argument or, for a single list, its largest item."""
    return max(_require_comparable(items, "max"))


def rounded(number: Any, digits: int = 0) -> Any:
    """Round a number to `digits` decimal places (halves away from zero). If `digits` is 0, return an integer.

    A number of 2 to the power of 53 or more has no decimal places, and is returned unchanged.
    """
    if not _is_number(number) or not math.isfinite(number):
        raise ValueError(f"round() needs a finite number, not {_kind(number)}")
    if not 0 <= digits <= 15:
        raise ValueError("round() needs a number of digits from 0 to 15")
    if abs(number) >= 2**53:  # no float of this size has decimals
        return number
    exact = Decimal(repr(number)).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return float(exact) if digits else int(exact)


def timestamp_text(moment: datetime) -> str:
    """Return a timestamp in the format that the API uses."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def duration_text(duration: timedelta) -> str:
    """Return a duration in seconds as text, such as `90s`."""
    seconds = duration.total_seconds()
    return f"{int(seconds) if seconds == int(seconds) else seconds}s"


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Size": size,
    "String": string,
    "get": get,
    "json": to_json,
    "parse_json": parse_json,
    "lower": lambda text: _require_text(text, "lower").lower(),
    "upper": lambda text: _require_text(text, "upper").upper(),
    "trim": lambda text: _require_text(text, "trim").strip(),
    "split": lambda text, separator: split(_require_text(text, "split"), _require_text(separator, "split")),
    "join": lambda items, separator="": join(_require_list(items, "join"), _require_text(separator, "join")),
    "replace": lambda text, old, new: replace(
        _require_text(text, "replace"), _require_text(old, "replace"), _require_text(new, "replace")
    ),
    "keys": keys,
    "values": values,
    "sum": lambda items: total(_require_list(items, "sum")),
    "min": least,
    "max": greatest,
    "round": rounded,
}


def _kind(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), "a timestamp or duration")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    """Return whether a value contains no NaN or infinite number, which JSON would encode as null."""
    if isinstance(value, float):
        return math.isfinite(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_is_finite, items))


def _require_text(value: Any, function: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{function}() needs a string, not {_kind(value)}")
    return value


def _require_list(value: Any, function: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{function}() needs a list, not {_kind(value)}")
    return value


def _require_object(value: Any, function: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{function}() needs an object, not {_kind(value)}")
    return value


def _require_comparable(items: tuple[Any, ...], function: str) -> list[Any]:
    found = items[0] if len(items) == 1 and isinstance(items[0], list) else list(items)
    if not found:
        raise ValueError(f"{function}() needs at least one value")
    if all(_is_number(item) for item in found) or len({type(item) for item in found}) == 1:
        return found
    raise ValueError(f"{function}() needs numbers, or values of the same type")


def _check_length(length: int) -> None:
    if length > MAX_TEXT:
        raise ValueError(f"the result has more than {MAX_TEXT} characters")
