"""Alerts raised by the kernel, at most one per hour for each combination of alert and object."""

from __future__ import annotations

from corral import clock
from corral.events.event import SystemAlert, emit
from corral.events.log import EventRow


def raise_alert(alert: SystemAlert, object: tuple[str, str]) -> None:
    """Emit an alert to admins, unless the same alert was emitted within the last hour.

    Runs in the caller's unit of work.
    """
    is_same_alert = (
        (EventRow.object_type == object[0])
        & (EventRow.object_id == object[1])
        & (EventRow.type == SystemAlert.event)
        & (EventRow.ts > clock.now(-3600))
        & EventRow.data.contains(f'"kind":"{alert.kind}"')
    )
    if not EventRow.select().where(is_same_alert).exists():
        emit(alert, object=object)
