"""Builds the bodies of deliveries, and examples of event data."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.model import ADMIN
from corral.errors import Invalid
from corral.events.event import EventType, EventTypes
from corral.events.log import LoggedEvent
from corral.schema.conversion import encode
from corral_plugins.webhooks.shapes import WebhookEventType

LIMIT = 64 * 1024
TEST_EVENT = "webhook.test"
_FORMATS = {"date-time": "2026-01-31T09:30:00.000Z", "uuid": "01890a5d-ac96-774b-bcce-b302099a8057"}
MAX_DEPTH = 6


def body_of(*, type: str, timestamp: str, id: str, data: Any, object_id: str, href: str | None = None) -> str:
    """Return the body of a delivery as JSON text.

    If the body would exceed `LIMIT` bytes, the data is replaced by the id and API URL of its object. The data of an
    event is never too large, because the event log limits it to half of `LIMIT`.
    """
    message = {"type": type, "timestamp": timestamp, "id": id, "data": data}
    body = encode(message)
    if len(body) > LIMIT:
        body = encode({**message, "data": {"id": object_id, "href": href, "truncated": True}})
    return body.decode()


def body_of_event(event: LoggedEvent) -> str:
    """Return the body of a delivery that reports an event."""
    data = msgspec.Raw(event.data.encode())
    return body_of(type=event.type, timestamp=event.ts, id=event.id, data=data, object_id=event.object_id)


@functools.lru_cache(maxsize=1000)
def matching_patterns(name: str) -> tuple[str, ...]:
    """Return an event name and every pattern that matches it: for `a.b.c`, also `a.b.*`, `a.*` and `*`."""
    parts = name.split(".")
    return (name, *(".".join(parts[:size]) + ".*" for size in range(len(parts) - 1, 0, -1)), "*")


class WebhookEvents:
    """Describes the events that webhooks can receive. No method requires a unit of work."""

    def __init__(self, types: EventTypes) -> None:
        self._types = types

    def check(self, patterns: list[str]) -> list[str]:
        """Return the given names and patterns without duplicates. Raise `Invalid` if one of them matches no event."""
        for index, pattern in enumerate(patterns):
            if not self._types.is_known(pattern):
                detail = f"No event is named {pattern}; `corral webhooks event-types` lists them."
                raise Invalid.at(f"/events/{index}", "not_in_enum", detail, problem="unknown_event")
        return list(dict.fromkeys(patterns))

    def receivable_by(self, caller: Principal) -> list[WebhookEventType]:
        """Return the events that the caller's webhooks can receive, sorted by name."""
        return [_describe(each) for each in self._types.all() if caller.is_admin or each.visibility != ADMIN]

    def example(self, name: str) -> dict[str, Any]:
        """Return an example of an event's data. Raise `Invalid` if there is no such event."""
        found = next((each for each in self._types.all() if each.event == name), None)
        if found is None:
            detail = f"No event is named {name}; `corral webhooks event-types` lists them."
            raise Invalid.at("/event", "not_in_enum", detail, problem="unknown_event")
        return _describe(found).example


@functools.lru_cache(maxsize=1000)  # describing all events takes 20 ms, on the event loop
def _describe(kind: EventType) -> WebhookEventType:
    schema = msgspec.json.schema(kind.payload)
    example = _example(schema, schema.get("$defs", {}), MAX_DEPTH)
    return WebhookEventType(event=kind.event, title=kind.title, schema=schema, example=example)


def _example(schema: Mapping[str, Any], shared: Mapping[str, Any], depth: int) -> Any:
    """Return a value that conforms to a `msgspec` JSON Schema.

    Down to the nesting depth `depth`, objects contain all of their properties. Below that depth, they contain only the
    required properties.
    """
    while "$ref" in schema:
        schema = shared[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        options = [each for each in schema["anyOf"] if each.get("type") != "null"] or schema["anyOf"]
        return _example(options[0], shared, depth)
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            names = schema.get("properties", {}) if depth else {}
            wanted = names if depth else schema.get("required", ())
            return {name: _example(schema["properties"][name], shared, max(0, depth - 1)) for name in wanted}
        case "array":
            items = schema.get("items")
            return [_example(items, shared, depth - 1)] if depth and items else []
        case "integer" | "number":
            return schema.get("minimum", 1)
        case "boolean":
            return True
        case "string":
            return _FORMATS.get(schema.get("format", ""), "text")
    return None
