"""Lists and retries deliveries. Every method runs in the caller's unit of work."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral.errors import Conflict
from corral.http.page import Page, newest_first, paginate
from corral.plugin import Audit, AuditEntry
from corral_plugins.notifications.models import IS_OPEN, Channel, Delivery, Group
from corral_plugins.notifications.service.delivery_changes import waiting_columns
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher
from corral_plugins.notifications.service.rows import delivery_view, find_delivery
from corral_plugins.notifications.shapes import NotificationDeliveryQuery, NotificationDeliveryView

AT_ONCE = 500


class NotificationDeliveries:
    """Lists and retries deliveries."""

    audit: Audit | None = None

    def __init__(self, dispatcher: NotificationDispatcher) -> None:
        self._dispatcher = dispatcher

    def list(self, query: NotificationDeliveryQuery, *, by: Principal) -> Page[NotificationDeliveryView]:
        """Return a page of deliveries, newest first."""
        rows = Delivery.select()
        if query.channel_id is not UNSET:
            rows = rows.where(Delivery.channel_id == query.channel_id.lower())
        if query.rule_id is not UNSET:
            rows = rows.where(Delivery.rule_id == query.rule_id.lower())
        if query.status is not UNSET:
            rows = rows.where(Delivery.status.in_(query.status))
        order = newest_first(Delivery)
        return paginate(rows, query, by, scope="notifications.deliveries", order=order, make=delivery_view)

    def retry(self, delivery_id: str) -> NotificationDeliveryView:
        """Retry a delivery that failed, was cancelled or was suppressed. Its attempts are counted from zero again.

        Raise `Conflict` if the delivery has another status, or if its channel was deleted.
        """
        row = find_delivery(delivery_id)
        if not Channel.select().where(Channel.id == row.channel_id).exists():
            raise Conflict("The channel of this delivery was deleted.", current_status=row.status)
        now = clock.now()
        fresh: dict[str, Any] = {"status": "pending", "attempts": 0, "finished_at": None, "ready_at": now}
        again = (Delivery.id == row.id) & Delivery.status.in_(("failed", "cancelled", "suppressed"))
        if not Delivery.update({**fresh, **waiting_columns(now)}).where(again).execute():
            raise Conflict("Only a failed, cancelled or suppressed delivery can be retried.", current_status=row.status)
        after_commit(self._dispatcher.wake)
        if self.audit is not None:
            entry = AuditEntry(
                action="notifications.delivery.retry",
                object_type="notification_delivery",
                object_id=row.id,
                changes={"status": (row.status, "pending")},
            )
            self.audit.record(entry)
        return delivery_view(find_delivery(row.id))


def delete_ended(before: str) -> int:
    """Delete a batch of deliveries that ended before a given time. Return the number of deleted deliveries."""
    old = Delivery.select(Delivery.id).where(Delivery.finished_at < before).order_by(Delivery.finished_at)
    return int(Delivery.delete().where(Delivery.id.in_(old.limit(AT_ONCE)) & ~IS_OPEN).execute())


def delete_old_groups(before: str) -> int:
    """Delete a batch of groups whose last message was sent before a given time. Return how many were deleted."""
    old = Group.select(Group.id).where(Group.last_sent_at < before).limit(AT_ONCE)
    return int(Group.delete().where(Group.id.in_(old)).execute())
