"""Alerts of the kernel: of one kind and object at most one an hour."""

from __future__ import annotations

from corral import clock
from corral.events.event import SystemAlert, emit
from corral.events.log import EventRow


def raise_alert(alert: SystemAlert, object: tuple[str, str]) -> None:
    """Tell admins, unless they were told of this within the last hour; joins the unit."""
    told = (
        (EventRow.object_type == object[0])
        & (EventRow.object_id == object[1])
        & (EventRow.type == SystemAlert.event)
        & (EventRow.ts > clock.now(-3600))
        & EventRow.data.contains(f'"kind":"{alert.kind}"')
    )
    if not EventRow.select().where(told).exists():
        emit(alert, object=object)
