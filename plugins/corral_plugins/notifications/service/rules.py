"""Lists, creates, reads, changes and deletes rules. Every method runs in the caller's unit of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import after_commit, locked
from corral.errors import Conflict, Invalid
from corral.events import log as event_log
from corral.http.answers import IfMatch
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import Audit, AuditEntry
from corral_core.accounts.api import Accounts
from corral_plugins.notifications.models import Channel, Rule, RuleChannel
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher
from corral_plugins.notifications.service.rows import find_rule, rule_view
from corral_plugins.notifications.shapes import NewNotificationRule, NotificationRuleView, RulePatch

FIELDS = tuple(name for name in NewNotificationRule.__struct_fields__ if name not in ("recipients", "quiet_hours"))


class RuleManagement:
    """Manages rules."""

    audit: Audit | None = None

    def __init__(self, accounts: Accounts, dispatcher: NotificationDispatcher) -> None:
        self._accounts, self._dispatcher = accounts, dispatcher

    def list(self, query: PageQuery, *, by: Principal) -> Page[NotificationRuleView]:
        """Return a page of rules, newest first."""
        order = newest_first(Rule)
        return paginate(Rule.select(), query, by, scope="notifications.rules", order=order, make=rule_view)

    def get(self, rule_id: str) -> NotificationRuleView:
        """Return a rule."""
        return rule_view(find_rule(rule_id))

    def row(self, rule_id: str) -> Rule:
        """Return the row of a rule."""
        return find_rule(rule_id)

    def create(self, new: NewNotificationRule) -> NotificationRuleView:
        """Create a rule whose events and conditions have already been checked. The rule applies only to new events."""
        _require_free_name(new.name)
        values = self._values(new)
        now = clock.now()
        row = Rule.create(id=new_id(), created_at=now, updated_at=now, since_seq=event_log.last_seq(), **values)
        _link_channels(row.id, row.channel_ids)
        self._record_audit("create", row, {})
        after_commit(self._dispatcher.wake)
        return rule_view(row)

    def update(self, rule_id: str, patch: RulePatch, match: IfMatch) -> NotificationRuleView:
        """Change a rule. Its new events and conditions have already been checked.

        Raise `Invalid` if a person or channel does not exist, and `Conflict` if the name is taken (`duplicate`) or the
        rule was changed concurrently.
        """
        row = find_rule(rule_id)
        match.check(row.version)
        changes = self._values(patch)
        if changes.get("name", row.name) != row.name:
            _require_free_name(changes["name"])
        if changes.get("enabled") and not row.enabled:
            changes["since_seq"] = event_log.last_seq()  # events that came while it was disabled are not told
        told = {name: (getattr(row, name), value) for name, value in changes.items() if name != "since_seq"}
        changes |= {"version": row.version + 1, "updated_at": clock.now()}
        if not Rule.update(changes).where((Rule.id == row.id) & (Rule.version == row.version)).execute():
            raise Conflict(
                "The rule was changed by another request at the same time; repeat the request.",
                current_status="changed",
            )
        for column, value in changes.items():
            setattr(row, column, value)
        if "channel_ids" in changes:
            RuleChannel.delete().where(RuleChannel.rule_id == row.id).execute()
            _link_channels(row.id, row.channel_ids)
        self._record_audit("update", row, told)
        after_commit(self._dispatcher.wake)
        return rule_view(row)

    def delete(self, rule_id: str, match: IfMatch) -> None:
        """Delete a rule. Messages that the rule has already created are still sent."""
        locked(Rule.select(Rule.id).where(Rule.id == rule_id.lower())).first()  # keeps the version as it is
        row = find_rule(rule_id)
        match.check(row.version)
        RuleChannel.delete().where(RuleChannel.rule_id == row.id).execute()
        Rule.delete().where(Rule.id == row.id).execute()
        self._record_audit("delete", row, {})

    # -- parts

    def _values(self, given: NewNotificationRule | RulePatch) -> dict[str, Any]:
        """Convert the given fields to database columns. Raise `Invalid` if a person or channel does not exist."""
        values = {name: getattr(given, name) for name in FIELDS if getattr(given, name) is not UNSET}
        for name in ("events", "group_by", "channel_ids"):
            if name in values:
                values[name] = list(dict.fromkeys(values[name]))
        if "channel_ids" in values:
            values["channel_ids"] = [each.lower() for each in values["channel_ids"]]
            _check_channels(values["channel_ids"])
        if given.recipients is not UNSET:
            users = [each.lower() for each in given.recipients.users]
            self._check_users(users)
            values["recipients"] = msgspec.to_builtins(msgspec.structs.replace(given.recipients, users=users))
        if given.quiet_hours is not UNSET:
            values["quiet_hours"] = msgspec.to_builtins(given.quiet_hours)
        return values

    def _check_users(self, users: Sequence[str]) -> None:
        found = {key for key, user in self._accounts.get_many(users).items() if user.is_active} if users else set()
        for index, each in enumerate(users):
            if each not in found:
                detail = "There is no active user with this id."
                pointer = f"/recipients/users/{index}"
                raise Invalid.at(pointer, "unknown_reference", detail, problem="unknown_reference")

    def _record_audit(self, verb: str, row: Rule, changes: Mapping[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"notifications.rule.{verb}",
                object_type="notification_rule",
                object_id=row.id,
                object_name=row.name,
                changes=changes,
            )
            self.audit.record(entry)


def _check_channels(ids: list[str]) -> None:
    rows = Channel.select(Channel.id).where(Channel.id.in_(ids)).order_by(Channel.id)
    found = {row.id for row in locked(rows, share=True)} if ids else set()  # so that none is deleted meanwhile
    for index, each in enumerate(ids):
        if each not in found:
            detail = "There is no channel with this id."
            raise Invalid.at(f"/channel_ids/{index}", "unknown_reference", detail, problem="unknown_reference")


def _link_channels(rule_id: str, channel_ids: Iterable[str]) -> None:
    rows = [{"rule_id": rule_id, "channel_id": each} for each in channel_ids]
    if rows:
        RuleChannel.insert_many(rows).execute()


def _require_free_name(name: str) -> None:
    if Rule.select().where(Rule.name == name).exists():
        raise Conflict(f"A notification rule named {name} already exists.", code="duplicate")
