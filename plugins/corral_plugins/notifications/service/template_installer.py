"""Installs notification rules from marketplace templates."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from corral.auth.principal import Principal
from corral.database.unit import locked
from corral.http.answers import ANY_VERSION
from corral.schema.conversion import convert
from corral_plugins.marketplace.api import InstalledObject, Installer, ObjectUse, functions_of
from corral_plugins.notifications.api import Json
from corral_plugins.notifications.models import Rule
from corral_plugins.notifications.service.rows import rule_view
from corral_plugins.notifications.service.rules import RuleManagement
from corral_plugins.notifications.service.validation import RuleChecks
from corral_plugins.notifications.shapes import NewNotificationRule, RulePatch

PERMISSION = "notifications.manage"


class RuleTemplateInstaller:
    """The installer for objects of the kind `notification_rule`. Its services are set after startup."""

    management: RuleManagement | None = None
    checks: RuleChecks | None = None

    def definition(self) -> Installer:
        """Return the definition of the installer."""
        return Installer(
            kind="notification_rule",
            title="Notification rule",
            schema=_schema(),
            write=PERMISSION,
            read=PERMISSION,
            **functions_of(self),
        )

    def check_spec(self, spec: Json) -> None:
        """Raise `Invalid` if the events or the conditions of the rule in `spec` are not valid."""
        assert self.checks is not None
        self.checks.check_rule(convert(NewNotificationRule, {**spec, "enabled": False}))

    def find_existing(self, names: Sequence[str]) -> Mapping[str, str]:
        """Return the ids of the existing rules with the given names, keyed by name."""
        rows: Any = Rule.select(Rule.name, Rule.id).where(Rule.name.in_(list(names))).tuples()
        return {str(name): str(rule_id) for name, rule_id in rows}

    def install(self, spec: Json, by: Principal) -> InstalledObject:
        """Create a disabled rule."""
        return InstalledObject(id=self._service().create(convert(NewNotificationRule, {**spec, "enabled": False})).id)

    def read_fields(self, ids: Sequence[str]) -> Mapping[str, Json]:
        """Return the editable fields of each rule, keyed by rule id. The field `enabled` is omitted."""
        return {row.id: _values(row) for row in Rule.select().where(Rule.id.in_(list(ids)))}

    def lock(self, ids: Sequence[str]) -> None:
        """Lock the given rules until the unit of work ends."""
        list(locked(Rule.select(Rule.id).where(Rule.id.in_(list(ids))).order_by(Rule.id)))

    def update(self, rule_id: str, fields: Json, by: Principal) -> None:
        """Change a rule. The new values have already been checked."""
        self._service().update(rule_id, convert(RulePatch, fields), ANY_VERSION)

    def find_uses(self, ids: Sequence[str]) -> Sequence[ObjectUse]:
        """Return an empty list, because rules refer only to people and channels, and templates create neither."""
        return []

    def find_running(self, ids: Sequence[str]) -> Sequence[str]:
        """Return an empty list, because rules do not run on their own."""
        return []

    def remove(self, rule_id: str, by: Principal) -> None:
        """Delete a rule."""
        self._service().delete(rule_id, ANY_VERSION)

    def export(self, rule_id: str, by: Principal) -> Json:
        """Return the editable fields of a rule.

        People and channels are omitted, because they are specific to this installation.
        """
        row = self._service().row(rule_id)
        values = {name: value for name, value in _values(row).items() if value is not None and name != "channel_ids"}
        values["recipients"] = {**values["recipients"], "users": []}
        return values

    def _service(self) -> RuleManagement:
        assert self.management is not None
        return self.management


def _values(row: Rule) -> Json:
    view: Json = msgspec.to_builtins(rule_view(row))
    return {name: view[name] for name in NewNotificationRule.__struct_fields__ if name != "enabled"}


@functools.cache
def _schema() -> Json:
    """Return the schema of a rule in a template, without `enabled`, because such rules are always created disabled."""
    schema = msgspec.json.schema(NewNotificationRule)
    fields: Json = schema["$defs"]["NewNotificationRule"]["properties"]
    del fields["enabled"]
    return schema
