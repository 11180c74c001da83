"""Lists, creates, reads, changes and deletes webhooks. Every method runs in the caller's unit of work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.unit import locked
from corral.errors import Conflict, NotFound, Problem
from corral.events import log as event_log
from corral.http.answers import IfMatch
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral.plugin import SECRET_CHANGE, Audit, AuditEntry, Settings
from corral_plugins.webhooks.api import WebhookCreated, WebhookDeleted, WebhookUpdated
from corral_plugins.webhooks.models import Subscription, Webhook
from corral_plugins.webhooks.service.credentials import WebhookCredentials
from corral_plugins.webhooks.service.disabling import cancel_deliveries, disable_webhook, publish
from corral_plugins.webhooks.service.fan_out import RECORDED_REASONS
from corral_plugins.webhooks.service.rows import count_open, find_webhook, view_fields, webhook_view
from corral_plugins.webhooks.service.validation import CheckedWebhook
from corral_plugins.webhooks.settings import MAX_PER_USER
from corral_plugins.webhooks.shapes import (
    CreatedWebhook,
    NewWebhook,
    RotatedWebhookSecret,
    WebhookPatch,
    WebhookQuery,
    WebhookView,
)

SECRETS = ("secret", "headers")
AUDITED = (*SECRETS, "url", "events", "description", "filter", "is_active")


class WebhookManagement:
    """Manages webhooks."""

    audit: Audit | None = None

    def __init__(self, settings: Settings, credentials: WebhookCredentials) -> None:
        self._settings, self._credentials = settings, credentials

    def list(self, query: WebhookQuery, *, by: Principal) -> Page[WebhookView]:
        """Return a page of the caller's webhooks.

        With `query.all`, return all users' webhooks, but without private fields. Only admins may do this. Raise a
        `Problem` (`forbidden`) if anyone else asks for them.
        """
        if query.all and not by.may("webhooks.manage"):
            raise Problem("Only admins may list the webhooks of all users.", code="forbidden")
        rows = Webhook.select() if query.all else Webhook.select().where(visible(Webhook, by))
        if query.is_active is not UNSET:
            rows = rows.where(Webhook.is_active if query.is_active else ~Webhook.is_active)
        found = paginate(rows, query, by, scope="webhooks", order=newest_first(Webhook), make=_identity)
        pending = count_open([row.id for row in found.items])
        items = [WebhookView(**view_fields(row, pending.get(row.id, 0), is_whole=not query.all)) for row in found.items]
        return Page(items=items, total=found.total, limit=found.limit, offset=found.offset, next=found.next)

    def get(self, webhook_id: str, *, by: Principal) -> WebhookView:
        """Return one of the caller's webhooks."""
        return webhook_view(find_webhook(webhook_id, by))

    def row(self, webhook_id: str, *, by: Principal) -> Webhook:
        """Return the database row of one of the caller's webhooks."""
        return find_webhook(webhook_id, by)

    def create(self, new: NewWebhook, checked: CheckedWebhook, secret: str, *, by: Principal) -> CreatedWebhook:
        """Create a webhook. The caller must have checked the fields."""
        assert by.user_id is not None
        self._check_quota(by)
        now, webhook_id = clock.now(), new_id()
        row = Webhook.create(
            id=webhook_id,
            user_id=by.user_id,
            created_at=now,
            updated_at=now,
            url=new.url,
            host=checked.host,
            events=checked.events,
            description=new.description,
            filter=new.filter,
            secret=self._credentials.seal_secret(webhook_id, secret),
            headers=self._credentials.seal_headers(webhook_id, new.headers),
            header_names=list(new.headers),
            is_active=new.is_active,
            since_seq=event_log.last_seq(),
            claimed_at=now,
        )
        _subscribe(webhook_id, row.events)
        publish(WebhookCreated, row)
        self._record_audit("create", row)
        return CreatedWebhook(**view_fields(row, 0), warnings=checked.warnings, secret=secret)

    def update(
        self, webhook_id: str, patch: WebhookPatch, checked: CheckedWebhook, match: IfMatch, *, by: Principal
    ) -> WebhookView:
        """Change a webhook. The caller must have checked the new fields."""
        row = find_webhook(webhook_id, by)
        match.check(row.version)
        given = msgspec.structs.asdict(patch)
        changes = {
            name: given[name] for name in ("url", "description", "filter", "is_active") if given[name] is not UNSET
        }
        if patch.url is not UNSET:
            changes["host"] = checked.host
        if patch.events is not UNSET:
            changes["events"] = checked.events
        if patch.secret is not UNSET:
            sealed = self._credentials.seal_secret(row.id, patch.secret)
            changes |= {"secret": sealed, "old_secret": None, "old_until": None}
        if patch.headers is not UNSET:
            sealed_headers = self._credentials.seal_headers(row.id, patch.headers)
            changes |= {"headers": sealed_headers, "header_names": list(patch.headers)}
        self._change(row, changes)
        return msgspec.structs.replace(webhook_view(row), warnings=checked.warnings)

    def set_active(self, webhook_id: str, is_active: bool, match: IfMatch, *, by: Principal) -> WebhookView:
        """Enable or disable a webhook.

        Admins can also disable other users' webhooks, but then do not receive private fields.
        """
        try:
            row = find_webhook(webhook_id, by)
        except NotFound:
            if is_active or not by.may("webhooks.manage"):
                raise
            return self._disable_others(webhook_id, match)
        match.check(row.version)
        self._change(row, {"is_active": is_active})
        return webhook_view(row)

    def delete(self, webhook_id: str, match: IfMatch, *, by: Principal) -> None:
        """Delete a webhook, and cancel its open deliveries."""
        locked(Webhook.select(Webhook.id).where(Webhook.id == webhook_id.lower())).first()  # keeps the version as it is
        row = find_webhook(webhook_id, by)
        match.check(row.version)
        delete_webhooks([row])
        self._record_audit("delete", row)

    def rotate_secret(
        self, webhook_id: str, secret: str, seconds: int, match: IfMatch, *, by: Principal
    ) -> RotatedWebhookSecret:
        """Replace the secret. For `seconds` seconds, messages are also signed with the old secret."""
        row = find_webhook(webhook_id, by)
        match.check(row.version)
        until = clock.now(seconds) if seconds else None
        old = {"old_secret": row.secret if seconds else None, "old_until": until}
        self._change(row, {"secret": self._credentials.seal_secret(row.id, secret), **old})
        return RotatedWebhookSecret(secret=secret, old_until=until)

    # -- parts

    def _disable_others(self, webhook_id: str, match: IfMatch) -> WebhookView:
        row: Webhook | None = Webhook.get_or_none(Webhook.id == webhook_id.lower())
        if row is None:
            raise NotFound("There is no webhook with this id.")
        match.check(row.version)
        if disable_webhook(row, "admin"):
            self._record_audit("disable", row)
        return webhook_view(Webhook.get_by_id(row.id), is_whole=False)

    def _change(self, row: Webhook, changes: dict[str, Any]) -> None:
        """Save changes to a webhook, and update its state, deliveries and subscriptions accordingly."""
        if not changes:
            return
        before = dict(row.__data__)
        if changes.get("is_active") is True and not row.is_active:
            if row.disabled_reason not in RECORDED_REASONS:
                changes["since_seq"] = event_log.last_seq()  # events that came while it was disabled are not sent
            changes |= {"disabled_reason": None, "failing_since": None, "failures": 0, "next_probe_at": None}
        if changes.get("is_active") is False:
            changes["disabled_reason"] = None
        self._write(row, changes)
        if not row.is_active:
            cancel_deliveries(row.id)
        if "events" in changes:
            Subscription.delete().where(Subscription.webhook_id == row.id).execute()
            _subscribe(row.id, changes["events"])
        publish(WebhookUpdated, row)
        self._record_audit("update", row, before, changes)

    def _record_audit(
        self, verb: str, row: Webhook, before: Mapping[str, Any] | None = None, changes: Mapping[str, Any] | None = None
    ) -> None:
        """Record a change in the audit log."""
        if self.audit is None:
            return
        told = {
            name: SECRET_CHANGE if name in SECRETS else ((before or {}).get(name), value)
            for name, value in (changes or {}).items()
            if name in AUDITED
        }
        entry = AuditEntry(
            action=f"webhooks.webhook.{verb}",
            object_type="webhook",
            object_id=row.id,
            object_name=row.host,
            changes=told,
        )
        self.audit.record(entry)

    def _write(self, row: Webhook, changes: dict[str, Any]) -> None:
        changes |= {"version": row.version + 1, "updated_at": clock.now()}
        if not Webhook.update(changes).where((Webhook.id == row.id) & (Webhook.version == row.version)).execute():
            raise Conflict(
                "The webhook was changed by another request at the same time; repeat the request.",
                current_status="changed",
            )
        for column, value in changes.items():
            setattr(row, column, value)

    def _check_quota(self, by: Principal) -> None:
        most = self._settings.get(MAX_PER_USER)
        if Webhook.select().where(Webhook.user_id == by.user_id).count() >= most:
            raise Problem(
                f"You already have {most} webhooks, which is the maximum (webhooks.max_per_user); delete one first.",
                code="quota_exceeded",
            )


def delete_webhooks(rows: Iterable[Webhook]) -> None:
    """Delete webhooks, cancel their open deliveries, and notify their owners.

    Finished deliveries are kept until a job deletes them after `webhooks.retention_days`.
    """
    for row in rows:
        cancel_deliveries(row.id)
        Subscription.delete().where(Subscription.webhook_id == row.id).execute()
        Webhook.delete().where(Webhook.id == row.id).execute()
        publish(WebhookDeleted, row)


def _subscribe(webhook_id: str, patterns: Iterable[str]) -> None:
    Subscription.insert_many([{"webhook_id": webhook_id, "pattern": each} for each in patterns]).execute()


def _identity(row: Webhook) -> Webhook:
    return row
