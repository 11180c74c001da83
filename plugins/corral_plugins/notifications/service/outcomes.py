"""Records the results of delivery attempts and their consequences: retries, and the state of the channel.

Every method runs in the caller's unit of work.
"""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.database.unit import locked
from corral.events.alerts import raise_alert
from corral.events.event import SystemAlert
from corral.plugin import Settings
from corral_plugins.notifications.api import ChannelType, SendResult
from corral_plugins.notifications.models import Channel, Delivery
from corral_plugins.notifications.service.claims import GIVE_UP_SECONDS, ClaimedDelivery, has_valid_claim
from corral_plugins.notifications.service.delivery_changes import ended_columns, waiting_columns
from corral_plugins.notifications.service.event_catalogue import CHANNEL_FAILING
from corral_plugins.notifications.service.grouping import remember_sent
from corral_plugins.notifications.service.plain_text import one_line
from corral_plugins.notifications.settings import RETRY_SCHEDULE

AT_ONCE = 500
MAX_ERROR = 500
PAUSE_SECONDS = 10.0  # between two attempts of a message, however many others the channel accepts
LEAST_WAIT_SECONDS = 5.0  # a service may ask to wait for 0 seconds, again and again


class DeliveryOutcomes:
    """Records the results of delivery attempts."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def record(self, claimed: ClaimedDelivery, result: SendResult) -> bool:
        """Record the result of an attempt. Return False if the claim is no longer valid."""
        row: Channel | None = locked(Channel.select().where(Channel.id == claimed.channel.id)).first()
        served = list(result.served) or claimed.delivery.served
        changes = {"last_error": _error(result), "served": served, **self._next_state(claimed, result)}
        if not Delivery.update(changes).where(has_valid_claim(claimed.delivery)).execute():
            return False
        if result.error is None:
            remember_sent(claimed.delivery)
        if row is not None and _record_channel(row, claimed.kind, result):
            _alert_admins(row, result)
        return True

    def record_test(self, channel_id: str, kind: ChannelType, result: SendResult) -> None:
        """Record the result of a test notification.

        Admins are not alerted, because the admin who sent the test already sees the result.
        """
        row: Channel | None = locked(Channel.select().where(Channel.id == channel_id)).first()
        if row is not None:
            _record_channel(row, kind, result)

    def _next_state(self, claimed: ClaimedDelivery, result: SendResult) -> dict[str, Any]:
        """Return the changes to the row of a delivery after an attempt.

        If the service asks to wait, the attempt is not counted, unless the delivery has been waiting for more than a
        day.
        """
        schedule, attempts = self._settings.get(RETRY_SCHEDULE), claimed.delivery.attempts + 1
        if result.error is None:
            return {**ended_columns("succeeded"), "attempts": attempts}
        is_late = claimed.delivery.ready_at < clock.now(-GIVE_UP_SECONDS)
        if result.retry_after is not None and not result.permanent and not is_late:
            return {"status": "retrying", **waiting_columns(clock.now(max(result.retry_after, LEAST_WAIT_SECONDS)))}
        if result.permanent or attempts >= len(schedule):
            return {**ended_columns("failed"), "attempts": attempts}
        return {"status": "retrying", "attempts": attempts, **waiting_columns(clock.now(schedule[attempts]))}


def _record_channel(row: Channel, kind: ChannelType, result: SendResult) -> bool:
    """Record the result of an attempt in the channel's row. Return whether the channel is failing."""
    mine = Channel.id == row.id
    if result.error is None:
        well = {"last_success_at": clock.now(), "last_error": None, "failing_since": None}
        Channel.update(well).where(mine).execute()
        _make_due(row.id)
        return False
    if result.retry_after is not None and not result.permanent:
        Channel.update(next_send_at=clock.now(result.retry_after)).where(mine).execute()
        return False
    if result.permanent and kind.breaker is not None:  # one message was refused; the service works
        Channel.update(last_error=_error(result)).where(mine).execute()
        return False
    failing = {"last_error": _error(result), "failing_since": row.failing_since or clock.now()}
    Channel.update(failing).where(mine).execute()
    return True


def _make_due(channel_id: str) -> None:
    """Schedule waiting deliveries of a channel for an earlier time, because the channel works again.

    These are deliveries that wait for another attempt or for an earlier message. They do not become due immediately: an
    overloaded service might accept only a few messages, and the other deliveries would then fail repeatedly and run out
    of attempts within seconds.
    """
    now, soon = clock.now(), clock.now(PAUSE_SECONDS)
    waiting = Delivery.select(Delivery.id).where(
        (Delivery.channel_id == channel_id) & (Delivery.due_at > soon) & (Delivery.ready_at <= now)
    )
    some = Delivery.id.in_(waiting.order_by(Delivery.due_at).limit(AT_ONCE))
    Delivery.update(waiting_columns(soon)).where(some & Delivery.due_at.is_null(False)).execute()


def _alert_admins(row: Channel, result: SendResult) -> None:
    alert = SystemAlert(
        kind=CHANNEL_FAILING,
        severity="warning",
        title=f"The notification channel {row.name} is failing",
        detail=f"{_error(result)} Its messages wait and are sent again.",
        object={"type": "notification_channel", "id": row.id},
    )
    raise_alert(alert, ("notification_channel", row.id))


def _error(result: SendResult) -> str | None:
    """Return a result's error without control characters and lone surrogates, so that every database can store it."""
    if result.error is None:
        return None
    return one_line(result.error.encode(errors="replace").decode(), MAX_ERROR)
