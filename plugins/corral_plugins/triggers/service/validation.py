"""Checks the configuration, the expressions and the action of a trigger when the trigger is saved.

The checks run outside units of work. The objects to which an action refers are looked up in the unit of work that saves
the trigger.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.errors import FieldError, Forbidden, Invalid
from corral.plugin import Settings
from corral.schema.json_schema_validation import check_user_schema, json_schema_errors
from corral_core.accounts.api import TIMEZONE
from corral_core.expressions.api import Expressions
from corral_plugins.triggers.api import Json, TimeRule, TriggerAction, TriggerKind
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry, event_faults
from corral_plugins.triggers.service.timed_kinds import next_times
from corral_plugins.triggers.settings import MIN_INTERVAL_SECONDS

FILTER_ROOTS = ("payload", "event", "trigger")
ACTION_ROOTS = (*FILTER_ROOTS, "scheduled_for", "fired_at")
CHECKED_TIMES = 20


def require_action_permission(caller: Principal, permission: str, *, problem: type[Forbidden] = Forbidden) -> None:
    """Raise `problem` unless the caller may create triggers and has the permission that the action requires."""
    for needed in ("triggers.write", permission):
        if not caller.may(needed):
            raise problem(f"The action of this trigger needs the permission {needed}.")


class TriggerChecks:
    """Checks triggers. Every method that finds errors raises `Invalid` with a pointer for each error."""

    def __init__(self, types: TriggerTypeRegistry, expressions: Expressions, settings: Settings) -> None:
        self._types, self._expressions, self._settings = types, expressions, settings

    def schedule_limits(self) -> tuple[str, int]:
        """Return the installation's time zone and the minimum interval in seconds. Runs in a unit of work."""
        return self._settings.get(TIMEZONE), self._settings.get(MIN_INTERVAL_SECONDS)

    def check_config(self, type: str, config: Json, *, zone: str, min_seconds: int) -> TriggerKind:
        """Check the config of a trigger, and return the trigger's kind."""
        kind = self._types.require_kind(type)
        faults = json_schema_errors(kind.schema, config, pointer_prefix="/config")
        if not faults:
            found = kind.check(config) if kind.check is not None else ()
            faults = [FieldError(f"/config{each.pointer}", each.code, each.detail) for each in found]
            faults += event_faults(self._types, type, config)
            if type == "event" and config.get("filter") is not None:
                faults += self._expressions.check_expression(
                    config["filter"], roots=FILTER_ROOTS, pointer="/config/filter"
                )
        if not faults and kind.next_time is not None:
            faults += _faults_of_times(kind, config, zone, min_seconds)
        _raise_faults(faults)
        if type == "webhook" and config.get("payload_schema") is not None:
            check_user_schema(config["payload_schema"], pointer_prefix="/config/payload_schema")
        return kind

    def check_filter(self, text: str | None) -> None:
        """Check the filter of a trigger."""
        if text is not None:
            _raise_faults(self._expressions.check_expression(text, roots=FILTER_ROOTS, pointer="/filter"))

    def check_action(self, action: Json) -> TriggerAction:
        """Check the fields of an action and the expressions in them. Return the `TriggerAction` for its type."""
        found = self._types.require_action(action.get("type"))
        fields = action_fields(action)
        faults = self._expressions.check_template(fields, roots=ACTION_ROOTS, pointer="/action")
        if not faults:  # the value of a template is known only when the trigger fires
            templates = _template_pointers(fields, "/action")
            faults = [
                fault
                for fault in json_schema_errors(found.schema, fields, pointer_prefix="/action")
                if fault.pointer not in templates
            ]
        _raise_faults(faults)
        return found

    def check_rendered(self, action: TriggerAction, fields: Json) -> None:
        """Check the fields of an action after their templates have been rendered."""
        _raise_faults(json_schema_errors(action.schema, fields, pointer_prefix="/action"))


def action_fields(action: Mapping[str, Any]) -> Json:
    """Return the fields of an action except its type."""
    return {name: value for name, value in action.items() if name != "type"}


def default_fields(action: TriggerAction) -> Json:
    """Return the default values that the action's schema defines for its fields."""
    fields = action.schema.get("properties", {})
    return {name: each["default"] for name, each in fields.items() if "default" in each}


def constant_fields(fields: Mapping[str, Any]) -> Json:
    """Return the fields of an action that contain no templates."""
    return {name: value for name, value in fields.items() if not _template_pointers(value, "")}


def _template_pointers(value: Any, pointer: str) -> set[str]:
    if isinstance(value, str):
        return {pointer} if "{{" in value else set()
    if isinstance(value, Mapping):
        return {each for name, item in value.items() for each in _template_pointers(item, f"{pointer}/{name}")}
    if isinstance(value, list):
        return {each for index, item in enumerate(value) for each in _template_pointers(item, f"{pointer}/{index}")}
    return set()


def _faults_of_times(kind: TriggerKind, config: Json, zone: str, min_seconds: int) -> list[FieldError]:
    now = clock.time_s()
    times = next_times(kind, TimeRule(config=config, since=now, zone=zone), now, CHECKED_TIMES)
    if not times:
        place = "/config/at" if kind.type == "once" else "/config"
        return [FieldError(place, "in_the_past", "The trigger would never fire: its times have passed.")]
    shortest = min((after - before for before, after in itertools.pairwise(times)), default=None)
    if shortest is not None and shortest < min_seconds:
        place = "/config/seconds" if kind.type == "interval" else "/config"
        detail = f"Times less than {min_seconds} s apart (triggers.min_interval_seconds) are not allowed."
        return [FieldError(place, "too_small", detail)]
    return []


def _raise_faults(faults: Sequence[FieldError]) -> None:
    if faults:
        unknown = all(fault.code == "unknown_reference" for fault in faults)
        raise Invalid(faults[0].detail, code="unknown_reference" if unknown else None, errors=faults)
