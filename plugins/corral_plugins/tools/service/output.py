"""Conversion of tool results into plain JSON of at most 64 KiB, for the model and for storage."""

from __future__ import annotations

from typing import Any

import msgspec

LIMIT = 64 * 1024
NOTE = " [truncated: {omitted} of {size} bytes are omitted]"

_encode = msgspec.json.Encoder().encode


def to_json(value: Any) -> Any:
    """Convert a value, such as a struct, into plain JSON values."""
    return msgspec.json.decode(_encode(value))


def truncate(value: Any, limit: int = LIMIT) -> Any:
    """Truncate the longest strings of an object until the JSON has at most `limit` bytes.

    Any other value that is too large becomes one truncated string.
    """
    size = len(_encode(value))
    if size <= limit:
        return value
    if isinstance(value, str):
        return _truncate_text(value, limit, size)
    if isinstance(value, dict):
        shorter = dict(value)
        for name in sorted(
            (key for key in shorter if isinstance(shorter[key], str)), key=lambda key: -len(shorter[key])
        ):
            excess = len(_encode(shorter)) - limit
            if excess <= 0:
                break
            length = len(_encode(shorter[name]))
            shorter[name] = _truncate_text(shorter[name], max(200, length - excess), length)
        if len(_encode(shorter)) <= limit:
            return shorter
    return {"cut": _truncate_text(_encode(value).decode(), limit - 16, size)}


def _truncate_text(text: str, limit: int, size: int) -> str:
    """Truncate a text so that the JSON of the text, including the note, has at most `limit` bytes."""
    note = NOTE.format(omitted=size, size=size)
    kept = text.encode()[: max(0, limit - len(note) - 2)].decode(errors="ignore")
    while len(_encode(kept)) > max(2, limit - len(note)):  # escape sequences make the JSON longer than the text
        kept = kept[: len(kept) * 3 // 4]
    return kept + NOTE.format(omitted=size - len(kept.encode()), size=size)
