"""What a tool returned, as the model gets it and the record keeps it: redacted, and at most 64 KiB of JSON."""

from __future__ import annotations

from typing import Any

import msgspec

LIMIT = 64 * 1024
NOTE = " [cut: {left} of {size} bytes are left out]"

_encode = msgspec.json.Encoder().encode


def plain(value: Any) -> Any:
    """JSON values only: structs of services become objects."""
    return msgspec.json.decode(_encode(value))


def fitted(value: Any, limit: int = LIMIT) -> Any:
    """The value itself, or with its longest texts cut until it fits; what has no long text becomes one cut text."""
    size = len(_encode(value))
    if size <= limit:
        return value
    if isinstance(value, str):
        return _cut(value, limit, size)
    if isinstance(value, dict):
        slim = dict(value)
        for name in sorted((key for key in slim if isinstance(slim[key], str)), key=lambda key: -len(slim[key])):
            excess = len(_encode(slim)) - limit
            if excess <= 0:
                break
            long = len(_encode(slim[name]))
            slim[name] = _cut(slim[name], max(200, long - excess), long)
        if len(_encode(slim)) <= limit:
            return slim
    return {"cut": _cut(_encode(value).decode(), limit - 16, size)}


def _cut(text: str, limit: int, size: int) -> str:
    """The beginning of a text whose JSON, with the note that it was cut, has at most `limit` bytes."""
    note = NOTE.format(left=size, size=size)
    kept = text.encode()[: max(0, limit - len(note) - 2)].decode(errors="ignore")
    while len(_encode(kept)) > max(2, limit - len(note)):  # escapes made it longer
        kept = kept[: len(kept) * 3 // 4]
    return kept + NOTE.format(left=size - len(kept.encode()), size=size)
