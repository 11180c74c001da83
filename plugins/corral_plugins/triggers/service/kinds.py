"""The kinds of triggers that fire on events and webhook requests, and the registry of all kinds and actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.errors import FieldError, Invalid
from corral.events.event import EventTypes
from corral.plugin import Contributions
from corral_plugins.triggers.api import TaintCheck, TriggerAction, TriggerKind
from corral_plugins.triggers.service.timed_kinds import TIME_KINDS
from corral_plugins.triggers.shapes import TriggerType, TriggerTypes

EVENT_NAME = {"type": "string", "minLength": 1, "maxLength": 100}
EXPRESSION = {"type": "string", "minLength": 1, "maxLength": 4096}


def _object_schema(required: tuple[str, ...], properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


EVENT_KINDS = (
    TriggerKind(
        type="webhook",
        title="On a call from another system",
        schema=_object_schema(
            (),
            {
                "auth": {"enum": ["token", "hmac_sha256", "github", "standard"]},
                "signature_header": {"type": "string", "minLength": 1, "maxLength": 100},
                "dedupe_header": {"type": "string", "minLength": 1, "maxLength": 100},
                "payload_schema": {"type": "object"},
            },
        ),
        example={"auth": "hmac_sha256"},
    ),
    TriggerKind(
        type="event",
        title="On an event of Corral",
        schema=_object_schema(
            ("event",),
            {
                "event": EVENT_NAME,
                "filter": EXPRESSION,
                "debounce_seconds": {"type": "integer", "minimum": 1, "maximum": 3600},
                "threshold": _object_schema(
                    ("count", "within_seconds"),
                    {
                        "count": {"type": "integer", "minimum": 2, "maximum": 10_000},
                        "within_seconds": {"type": "integer", "minimum": 1, "maximum": 2_592_000},
                    },
                ),
            },
        ),
        example={"event": "task.failed"},
    ),
    TriggerKind(
        type="absence",
        title="When an expected event does not happen",
        schema=_object_schema(
            ("expect", "within_seconds"),
            {
                "expect": EVENT_NAME,
                "after": EVENT_NAME,
                "within_seconds": {"type": "integer", "minimum": 10, "maximum": 2_592_000},
                "for_each": {"type": "string", "minLength": 1, "maxLength": 200},
            },
        ),
        example={"expect": "worker.online", "after": "worker.offline", "within_seconds": 600, "for_each": "worker_id"},
    ),
    TriggerKind(type="manual", title="Only when fired manually", schema=_object_schema((), {}), example={}),
)


class TriggerTypeRegistry:
    """The trigger kinds and actions of all active plugins."""

    def __init__(self, contributions: Contributions, events: EventTypes) -> None:
        self._contributions, self._events = contributions, events

    def kind(self, type: str) -> TriggerKind | None:
        """Return the trigger kind with this type, or None if no active plugin provides it."""
        return next((kind for _, kind in self._kinds() if kind.type == type), None)

    def timed_types(self) -> list[str]:
        """Return the types of all active trigger kinds that fire at set times."""
        return [kind.type for _, kind in self._kinds() if kind.next_time is not None]

    def action(self, type: Any) -> TriggerAction | None:
        """Return the action with this type, or None if no active plugin provides it."""
        return next((action for _, action in self._actions() if action.type == type), None)

    def require_kind(self, type: str) -> TriggerKind:
        """Return the trigger kind with this type. Raise `Invalid` if no active plugin provides it."""
        if (found := self.kind(type)) is None:
            raise Invalid.at("/type", "not_in_enum", f"one of {', '.join(kind.type for _, kind in self._kinds())}")
        return found

    def require_action(self, type: Any) -> TriggerAction:
        """Return the action with this type. Raise `Invalid` if no active plugin provides it."""
        if (found := self.action(type)) is None:
            known = ", ".join(sorted(action.type for _, action in self._actions()))
            raise Invalid.at("/action/type", "not_in_enum", f"one of {known}")
        return found

    def taint_checks(self) -> list[TaintCheck]:
        """Return the checks, from all active plugins, that determine which objects are tainted."""
        return [check for _, check in self._contributions.for_hook("corral_trigger_taint_checks")]

    def is_event(self, name: str) -> bool:
        """Return whether an active plugin declares an event with this name, or an event that matches this pattern."""
        return self._events.is_known(name)

    def describe(self) -> TriggerTypes:
        """Return all kinds and actions with their schemas."""
        return TriggerTypes(
            kinds=[_described(plugin, kind) for plugin, kind in self._kinds()],
            actions=sorted((_described(plugin, action) for plugin, action in self._actions()), key=lambda a: a.type),
        )

    def _kinds(self) -> list[tuple[str, TriggerKind]]:
        own = [("triggers", kind) for kind in (*TIME_KINDS, *EVENT_KINDS)]
        return own + self._contributions.for_hook("corral_trigger_kinds")

    def _actions(self) -> list[tuple[str, TriggerAction]]:
        return self._contributions.for_hook("corral_trigger_actions")


def event_names(type: str, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return the event that a trigger listens for or expects, and the event that starts an absence trigger's wait."""
    if type == "event":
        return config["event"], None
    return (config["expect"], config.get("after")) if type == "absence" else (None, None)


def event_faults(types: TriggerTypeRegistry, type: str, config: Mapping[str, Any]) -> list[FieldError]:
    """Return an error for each event in a config that is `*` or that does not match an event of an active plugin."""
    names = {"event": ("event",), "absence": ("expect", "after")}.get(type, ())
    return [
        FieldError(f"/config/{name}", "unknown_reference", "There is no event with this name.")
        for name in names
        if config.get(name) is not None and (config[name] == "*" or not types.is_event(config[name]))
    ]


def _described(plugin: str, item: TriggerKind | TriggerAction) -> TriggerType:
    return TriggerType(type=item.type, title=item.title, plugin=plugin, schema=item.schema, example=item.example)
