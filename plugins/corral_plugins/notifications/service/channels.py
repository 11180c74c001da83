"""Lists, creates, reads, changes and deletes channels. Every method runs in the caller's unit of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import locked
from corral.errors import Conflict
from corral.events.event import emit
from corral.http.answers import IfMatch
from corral.http.page import Page, PageQuery, newest_first, paginate
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry
from corral_plugins.notifications.api import NotificationChannelChanged
from corral_plugins.notifications.models import Channel
from corral_plugins.notifications.service.credentials import ChannelCredentials
from corral_plugins.notifications.service.rows import channel_view, find_channel, used_by
from corral_plugins.notifications.service.validation import CheckedConfig
from corral_plugins.notifications.shapes import ChannelPatch, NewChannel, NotificationChannelView


class ChannelManagement:
    """Manages channels."""

    audit: Audit | None = None

    def __init__(self, credentials: ChannelCredentials) -> None:
        self._credentials = credentials

    def list(self, query: PageQuery, *, by: Principal) -> Page[NotificationChannelView]:
        """Return a page of channels, newest first."""
        order = newest_first(Channel)
        found = paginate(Channel.select(), query, by, scope="notifications.channels", order=order, make=_identity)
        rules = used_by([row.id for row in found.items])
        items = [channel_view(row, rules.get(row.id, [])) for row in found.items]
        return Page(items=items, total=found.total, limit=found.limit, offset=found.offset, next=found.next)

    def get(self, channel_id: str) -> NotificationChannelView:
        """Return a channel."""
        return _view(find_channel(channel_id))

    def row(self, channel_id: str) -> Channel:
        """Return the row of a channel."""
        return find_channel(channel_id)

    def create(self, new: NewChannel, checked: CheckedConfig) -> NotificationChannelView:
        """Create a channel whose config has been checked."""
        _require_free_name(new.name)
        now, channel_id = clock.now(), new_id()
        row = Channel.create(
            id=channel_id,
            created_at=now,
            updated_at=now,
            name=new.name,
            type=new.type,
            config=checked.config,
            secrets=self._credentials.seal(channel_id, checked.secrets),
            secret_names=list(checked.secrets),
            is_enabled=new.is_enabled,
        )
        _publish(row, "created")
        self._record_audit("create", row, {})
        return msgspec.structs.replace(_view(row), warnings=checked.warnings)

    def update(
        self, channel_id: str, patch: ChannelPatch, checked: CheckedConfig | None, match: IfMatch
    ) -> NotificationChannelView:
        """Change a channel. `checked` is the complete new config, or None if the config stays unchanged."""
        row = find_channel(channel_id)
        match.check(row.version)
        changes: dict[str, Any] = {}
        if patch.name is not UNSET and patch.name != row.name:
            _require_free_name(patch.name)
            changes["name"] = patch.name
        if patch.is_enabled is not UNSET:
            changes["is_enabled"] = patch.is_enabled
        told = {name: (getattr(row, name), value) for name, value in changes.items()}
        if checked is not None:
            if checked.version != row.version:  # it was merged into a config that is not the stored one any more
                raise _changed_error()
            told["config"] = (row.config, checked.config)
            if self._credentials.readable_secrets(row) != checked.secrets:
                changes["secrets"] = self._credentials.seal(row.id, checked.secrets)
                told["secrets"] = SECRET_CHANGE
            changes |= {"config": checked.config, "secret_names": list(checked.secrets)}
        self._write(row, changes)
        self._record_audit("update", row, told)
        return msgspec.structs.replace(_view(row), warnings=checked.warnings if checked is not None else [])

    def delete(self, channel_id: str, match: IfMatch) -> None:
        """Delete a channel that no rule uses.

        A delivery that is still waiting is cancelled when it becomes due for sending. Raise `Conflict` (`in_use`) if a
        rule uses the channel.
        """
        same = Channel.id == channel_id.lower()
        locked(Channel.select(Channel.id).where(same)).first()  # keeps its version, and the rules that use it
        row = find_channel(channel_id)
        match.check(row.version)
        if rules := used_by([row.id]).get(row.id):
            names = ", ".join(rule.name for rule in rules)
            detail = f"Notification rules use this channel: {names}. Remove it from them first."
            raise Conflict(detail, code="in_use", used_by=[msgspec.structs.asdict(rule) for rule in rules])
        Channel.delete().where(Channel.id == row.id).execute()
        _publish(row, "deleted")
        self._record_audit("delete", row, {})

    # -- parts

    def _write(self, row: Channel, changes: dict[str, Any]) -> None:
        changes |= {"version": row.version + 1, "updated_at": clock.now()}
        if not Channel.update(changes).where((Channel.id == row.id) & (Channel.version == row.version)).execute():
            raise _changed_error()
        for column, value in changes.items():
            setattr(row, column, value)
        _publish(row, "updated")

    def _record_audit(self, verb: str, row: Channel, changes: Mapping[str, tuple[Any, Any]]) -> None:
        if self.audit is not None:
            entry = AuditEntry(
                action=f"notifications.channel.{verb}",
                object_type="notification_channel",
                object_id=row.id,
                object_name=row.name,
                changes=changes,
            )
            self.audit.record(entry)


def _publish(row: Channel, change: str) -> None:
    """Notify all processes that a channel changed, so that they redact its current credentials."""
    event = NotificationChannelChanged(channel_id=row.id, name=row.name, change=change)
    emit(event, object=("notification_channel", row.id))


def _view(row: Channel) -> NotificationChannelView:
    return channel_view(row, used_by([row.id]).get(row.id, []))


def _changed_error() -> Conflict:
    return Conflict(
        "The channel was changed by another request at the same time; repeat the request.", current_status="changed"
    )


def _require_free_name(name: str) -> None:
    if Channel.select().where(Channel.name == name).exists():
        raise Conflict(f"A channel named {name} already exists.", code="duplicate")


def _identity(row: Channel) -> Channel:
    return row
