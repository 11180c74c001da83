"""From what a handler returned to bytes, status and headers."""

from __future__ import annotations

from typing import Any

from corral.asgi.call import Call, Reply
from corral.asgi.endpoint import Endpoint
from corral.http.answers import Answer, Encoded, Stream, Text
from corral.schema.shapes import encode

LOCATED = (201, 202)


def render(value: Any, endpoint: Endpoint, call: Call) -> Reply:
    """Shape to JSON; ETag of versioned answers, `Location` of created ones, 304 when the client has it."""
    status = endpoint.route.status
    headers: dict[str, str] = {"Cache-Control": "no-store"} if endpoint.route.no_store else {}
    if isinstance(value, Answer):
        status = value.status or status
        headers.update(value.headers)
        value = value.body
    elif isinstance(value, Encoded):
        status = value.status or status
    elif isinstance(value, Text):
        return Reply(status, value.body.encode(), value.headers, value.media_type.encode())
    elif isinstance(value, Stream):
        return Reply(
            status,
            headers=value.headers,
            media_type=value.media_type.encode(),
            chunks=value.chunks,
            is_whole=value.is_whole,
        )
    if value is None and status == 204:
        return Reply(status, headers=headers)
    if endpoint.versioned:
        tag = headers.setdefault("ETag", f'"{value.version}"')
        if endpoint.is_read and not endpoint.route.live and tag in (call.header(b"if-none-match") or ""):
            return Reply(304, headers=headers)
    if status in LOCATED and "Location" not in headers:
        identifier = getattr(value, "id", None)
        if identifier is not None:
            headers["Location"] = _location(call.path, identifier)
    return Reply(status, value.body if isinstance(value, Encoded) else encode(value), headers)


def _location(path: str, identifier: str) -> str:
    """Below the path what was made there; an action's resource is the one that its path names."""
    place = path.lower().find(f"/{identifier}".lower())
    return f"{path.rstrip('/')}/{identifier}" if place < 0 else path[: place + 1] + identifier
