"""Disables webhooks: changes their state, cancels their open deliveries, and emits the related events.

Every function runs in the caller's unit of work.
"""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert, emit
from corral.jobs.job import enqueue
from corral_plugins.webhooks.api import WebhookDisabled, WebhookEvent
from corral_plugins.webhooks.models import IS_OPEN, Delivery, Webhook

CANCEL_JOB = "webhooks.cancel_deliveries"
AT_ONCE = 500


def publish(kind: type[WebhookEvent], row: Webhook, **facts: Any) -> None:
    """Emit an event about a webhook. The event is visible only to the webhook's owner."""
    emit(kind(webhook_id=row.id, **facts), object=("webhook", row.id), owner=row.user_id)


def disable_webhooks(which: Any, reason: str) -> None:
    """Disable the active webhooks that match a condition.

    Their open deliveries are cancelled, and their owners are notified.
    """
    rows = list(Webhook.select().where(which & Webhook.is_active))
    for row in rows:
        disable_webhook(row, reason)


def disable_webhook(row: Webhook, reason: str) -> bool:
    """Disable a webhook for a reason other than its owner's request.

    Return False if the webhook is no longer active.
    """
    changes = {"is_active": False, "disabled_reason": reason, "version": Webhook.version + 1, "updated_at": clock.now()}
    if not Webhook.update(changes).where((Webhook.id == row.id) & Webhook.is_active).execute():
        return False
    cancel_deliveries(row.id)
    publish(WebhookDisabled, row, reason=reason)
    if reason == "failing":
        _alert_admins(row)
    return True


def cancel_deliveries(webhook_id: str) -> None:
    """Cancel the open deliveries of a webhook. If there are many, a job cancels the rest."""
    now = clock.now()
    if cancel_batch(webhook_id, now) == AT_ONCE:
        enqueue(CANCEL_JOB, webhook_id=webhook_id, until=now)


def cancel_batch(webhook_id: str, until: str) -> int:
    """Cancel a batch of the open deliveries created up to `until`. Return the number of cancelled deliveries."""
    mine = IS_OPEN & (Delivery.webhook_id == webhook_id) & (Delivery.created_at <= until)
    some = Delivery.select(Delivery.id).where(mine).limit(AT_ONCE)
    return int(Delivery.update(**ended_columns("cancelled")).where(Delivery.id.in_(some) & IS_OPEN).execute())


def cancel_stranded() -> int:
    """Cancel a batch of open deliveries whose webhook is disabled or deleted.

    Return the number of cancelled deliveries. Such deliveries are inserted by units of work that had not yet seen that
    the webhook was disabled or deleted.
    """
    active = Webhook.select(Webhook.id).where(Webhook.is_active)
    some = Delivery.select(Delivery.id).where(Delivery.due_at.is_null(False) & Delivery.webhook_id.not_in(active))
    return int(
        Delivery.update(**ended_columns("cancelled")).where(Delivery.id.in_(some.limit(AT_ONCE)) & IS_OPEN).execute()
    )


def ended_columns(status: str) -> dict[str, Any]:
    """Return the column changes that end a delivery with this status.

    If an attempt is running, its lease is removed.
    """
    waiting = dict.fromkeys(("next_attempt_at", "due_at", "lease", "lease_until"))
    return {"status": status, "finished_at": clock.now(), **waiting}


def _alert_admins(row: Webhook) -> None:
    alert = SystemAlert(
        kind="webhook_disabled",
        severity="warning",
        title=f"A webhook to {row.host} was disabled",
        detail=f"No delivery has succeeded since {row.failing_since}. Its owner can enable it, and recover the events.",
        object={"type": "webhook", "id": row.id},
    )
    raise_alert(alert, ("webhook", row.id))
