"""Installs triggers from marketplace templates."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import peewee

from corral.auth.principal import Principal
from corral.database.unit import locked
from corral.errors import Invalid
from corral.http.answers import ANY_VERSION
from corral.schema.conversion import convert
from corral_plugins.marketplace.api import InstalledObject, Installer, ObjectUse, functions_of
from corral_plugins.triggers.models import LIVING, PENDING, Fire, Trigger
from corral_plugins.triggers.service.management import TriggerManagement, new_ingress_secrets
from corral_plugins.triggers.service.rows import find_readable_trigger
from corral_plugins.triggers.service.validation import TriggerChecks
from corral_plugins.triggers.settings import MIN_INTERVAL_SECONDS
from corral_plugins.triggers.shapes import NewTrigger, TriggerPatch

Json = dict[str, Any]
COPIED = (
    "name",
    "description",
    "type",
    "config",
    "action",
    "overlap",
    "catch_up",
    "catch_up_window_seconds",
    "max_fires_per_hour",
)


class TriggerTemplateInstaller:
    """Installs marketplace templates of the kind `trigger`.

    The services that the installer uses are set after the kernel has booted.
    """

    management: TriggerManagement | None
    checks: TriggerChecks | None

    def definition(self) -> Installer:
        """Return the installer definition for the marketplace."""
        return Installer(
            kind="trigger",
            title="Trigger",
            schema=_schema(),
            write="triggers.write",
            read="triggers.read",
            **functions_of(self),
        )

    def check_spec(self, spec: Json) -> None:
        """Raise `Invalid` if the configuration, the filter or the action is not valid."""
        assert self.checks is not None
        new = convert(NewTrigger, {**spec, "enabled": False})
        self.checks.check_config(new.type, new.config, zone="UTC", min_seconds=MIN_INTERVAL_SECONDS.default)
        self.checks.check_filter(new.filter)
        self.checks.check_action(new.action)

    def find_existing(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the ids of the triggers with these names, keyed by name."""
        rows: Any = Trigger.select(Trigger.name, Trigger.id).where(LIVING & Trigger.name.in_(list(names))).tuples()
        return {str(name): str(trigger_id) for name, trigger_id in rows}

    def install(self, spec: Json, by: Principal) -> InstalledObject:
        """Create a trigger. The new trigger is disabled."""
        new = convert(NewTrigger, {**spec, "enabled": False})
        made = self._service().create(new, new_ingress_secrets(), by=by)
        shown = {"ingress_url": made.ingress_url, "secret": made.secret}
        return InstalledObject(id=made.id, once={name: value for name, value in shown.items() if value is not None})

    def read_fields(self, ids: Sequence[str]) -> Mapping[str, Json]:
        """Return the fields that a trigger's owner may set, except `enabled`, keyed by trigger id."""
        return {row.id: _values(row) for row in Trigger.select().where(LIVING & Trigger.id.in_(list(ids)))}

    def lock(self, ids: Sequence[str]) -> None:
        """Lock the triggers until the unit of work ends."""
        list(locked(Trigger.select(Trigger.id).where(Trigger.id.in_(list(ids))).order_by(Trigger.id)))

    def update(self, trigger_id: str, fields: Json, by: Principal) -> None:
        """Change the given fields of a trigger. The caller must have checked the new configuration and filter.

        Raise `Invalid` if the fields include the type, or if the new action is not valid.
        """
        if "type" in fields:
            raise Invalid.at("/type", "not_allowed", "The type of a trigger cannot be changed.")
        kept = {name: value for name, value in fields.items() if value is not None or name == "filter"}
        self._service().update(trigger_id, convert(TriggerPatch, kept), ANY_VERSION, by=by)

    def find_uses(self, ids: Sequence[str]) -> Sequence[ObjectUse]:
        """Return the triggers whose actions refer to objects with these ids."""
        names = functools.reduce(operator.or_, [_text_contains(Trigger.action, each) for each in ids])
        return [
            ObjectUse(id=row.id, name=row.name, uses=each)
            for row in Trigger.select(Trigger.id, Trigger.name, Trigger.action).where(LIVING & names)
            for text in (msgspec.json.encode(row.action).decode(),)
            for each in ids
            if each in text
        ]

    def find_running(self, ids: Sequence[str]) -> Sequence[str]:
        """Return the subset of `ids` whose triggers have undecided slots."""
        active = Fire.trigger_id.in_(list(ids)) & PENDING
        rows: Any = Fire.select(Fire.trigger_id).where(active).distinct().tuples()
        return [str(row[0]) for row in rows]

    def remove(self, trigger_id: str, by: Principal) -> None:
        """Delete a trigger."""
        self._service().delete(trigger_id, ANY_VERSION, by=by)

    def export(self, trigger_id: str, by: Principal) -> Json:
        """Return those fields of a trigger that the trigger's owner may set."""
        return {name: value for name, value in _values(find_readable_trigger(trigger_id, by)).items() if value}

    def _service(self) -> TriggerManagement:
        assert self.management is not None
        return self.management


def _text_contains(column: Any, text: str) -> Any:
    """Return an SQL condition that is true if the JSON text of a column contains a string."""
    return peewee.Expression(column, peewee.OP.ILIKE, peewee.Value(f"%{text}%", converter=False))


def _values(row: Trigger) -> Json:
    return {**{name: getattr(row, name) for name in COPIED}, "filter": row.filter_expression}


@functools.cache
def _schema() -> Json:
    """Return the JSON Schema of a new trigger.

    The schema omits `enabled`, because templates always create disabled triggers.
    """
    schema = msgspec.json.schema(NewTrigger)
    fields: Json = schema["$defs"]["NewTrigger"]["properties"]
    del fields["enabled"]
    return schema
