"""Lists and resends deliveries. Every method runs in the caller's unit of work."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.errors import Conflict, Invalid
from corral.http.page import Page, newest_first, paginate
from corral.jobs.job import enqueue
from corral_plugins.webhooks.models import IS_OPEN, Delivery, Webhook
from corral_plugins.webhooks.service.disabling import AT_ONCE
from corral_plugins.webhooks.service.rows import delivery_details, delivery_view, find_delivery, find_webhook
from corral_plugins.webhooks.shapes import (
    DeliveryDetails,
    DeliveryQuery,
    DeliveryView,
    RecoverDeliveries,
    RecoveredDeliveries,
)

RECOVER_JOB = "webhooks.recover"
RECOVERY_DAYS, DAY = 14, 86_400
STALE_SECONDS = 600  # a recovery that has not ended by then has failed, and another may begin
CAN_RECOVER = Delivery.status.in_(("failed", "cancelled"))


class WebhookDeliveries:
    """Reads and resends deliveries."""

    def list(self, webhook_id: str, query: DeliveryQuery, *, by: Principal) -> Page[DeliveryView]:
        """Return a page of the deliveries to a webhook, newest first, without payloads."""
        row = find_webhook(webhook_id, by)
        where: Any = Delivery.webhook_id == row.id
        if query.status is not UNSET:
            where &= Delivery.status.in_(query.status)
        if query.event is not UNSET:
            where &= Delivery.event.in_(query.event)
        rows = Delivery.select().where(where)
        return paginate(rows, query, by, scope="webhooks.deliveries", order=newest_first(Delivery), make=delivery_view)

    def get(self, webhook_id: str, delivery_id: str, *, by: Principal) -> DeliveryDetails:
        """Return a delivery with its payload and its attempts."""
        return delivery_details(find_delivery(webhook_id, delivery_id, by)[1])

    def redeliver(self, webhook_id: str, delivery_id: str, *, by: Principal) -> DeliveryView:
        """Resend a delivery under the same id. Its retry schedule starts again.

        Raise `Conflict` if the webhook is disabled, or if the delivery is pending or being sent.
        """
        row, delivery = find_delivery(webhook_id, delivery_id, by)
        _require_active(row)
        again = (Delivery.id == delivery.id) & (Delivery.status != "pending") & Delivery.lease.is_null()
        if not Delivery.update(_columns_to_resend()).where(again).execute():
            raise Conflict("The delivery is already being sent; wait for its result.", current_status=delivery.status)
        return delivery_view(Delivery.get_by_id(delivery.id))

    def recover(self, webhook_id: str, body: RecoverDeliveries, *, by: Principal) -> RecoveredDeliveries:
        """Resend the failed and cancelled deliveries that were created since the requested time.

        The caller's unit of work queues the first batch of deliveries, and a job queues the rest. Raise `Invalid` if
        the time is more than 14 days ago, and `Conflict` if the webhook is disabled or an earlier recovery is still
        running (`batch_in_progress`).
        """
        row, since = find_webhook(webhook_id, by), clock.from_datetime(body.since)
        if since < clock.now(-RECOVERY_DAYS * DAY):
            raise Invalid.at("/since", "too_small", f"must be at most {RECOVERY_DAYS} days ago")
        _require_active(row)
        until = clock.now()
        is_idle = Webhook.recovering_at.is_null() | (Webhook.recovering_at < clock.now(-STALE_SECONDS))
        if not Webhook.update(recovering_at=until).where((Webhook.id == row.id) & is_idle).execute():
            raise Conflict(
                "An earlier recovery of this webhook's deliveries is still running; wait until it has ended.",
                code="batch_in_progress",
            )
        queued = Delivery.select().where(_recoverable(row.id, since, until)).count()
        if recover_batch(row.id, since, until) == AT_ONCE:
            enqueue(RECOVER_JOB, webhook_id=row.id, since=since, until=until)
        else:
            end_recovery(row.id)
        return RecoveredDeliveries(queued=queued)


def recover_batch(webhook_id: str, since: str, until: str) -> int:
    """Resend a batch of failed and cancelled deliveries. Return the number of resent deliveries.

    If the webhook has been disabled or deleted in the meantime, nothing is resent, because no process would claim the
    deliveries.
    """
    if not Webhook.select().where((Webhook.id == webhook_id) & Webhook.is_active).exists():
        return 0
    oldest = Delivery.select(Delivery.id).where(_recoverable(webhook_id, since, until)).order_by(Delivery.created_at)
    some = Delivery.id.in_(oldest.limit(AT_ONCE))
    return int(Delivery.update(_columns_to_resend()).where(some & CAN_RECOVER).execute())


def end_recovery(webhook_id: str) -> None:
    """Record that a recovery is finished, because all of its deliveries have been queued again."""
    Webhook.update(recovering_at=None).where(Webhook.id == webhook_id).execute()


def delete_batch(before: str) -> int:
    """Delete a batch of deliveries that ended before this time. Return the number of deleted deliveries."""
    old = Delivery.select(Delivery.id).where(Delivery.finished_at < before).order_by(Delivery.finished_at)
    return int(Delivery.delete().where(Delivery.id.in_(old.limit(AT_ONCE)) & ~IS_OPEN).execute())


def delete_batch_of(webhook_ids: list[str]) -> int:
    """Delete a batch of deliveries to the given deleted webhooks. Return the number of deleted deliveries."""
    some = Delivery.select(Delivery.id).where(Delivery.webhook_id.in_(webhook_ids)).limit(AT_ONCE)
    return int(Delivery.delete().where(Delivery.id.in_(some)).execute())


def _recoverable(webhook_id: str, since: str, until: str) -> Any:
    """Return an SQL condition that selects the deliveries to resend.

    Deliveries that failed after the recovery began are excluded.
    """
    is_old = (Delivery.created_at >= since) & (Delivery.finished_at <= until)
    return CAN_RECOVER & (Delivery.webhook_id == webhook_id) & is_old


def _columns_to_resend() -> dict[str, Any]:
    now = clock.now()
    return {"status": "pending", "attempt": 0, "next_attempt_at": now, "due_at": now, "finished_at": None}


def _require_active(row: Webhook) -> None:
    if not row.is_active:
        raise Conflict("The webhook is disabled; enable it first.", current_status="disabled")
