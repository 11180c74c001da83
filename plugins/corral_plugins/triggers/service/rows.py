"""Reads rows of triggers for a caller, and builds their API representations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import peewee

from corral import clock
from corral.auth.principal import Principal, require_owner
from corral.auth.visibility import visible
from corral.errors import NotFound
from corral_plugins.triggers.models import LIVING, Fire, Trigger
from corral_plugins.triggers.shapes import CatchUp, HistoryView, Overlap, Status, TriggerView

DAY = 86_400.0


def find_readable_trigger(trigger_id: str, caller: Principal, *, deleted: bool = False) -> Trigger:
    """Return a trigger. Raise `NotFound` if no such trigger is visible to the caller.

    Deleted triggers are found only if `deleted` is set.
    """
    where: Any = (Trigger.id == trigger_id.lower()) & visible(Trigger, caller)
    row: Trigger | None = Trigger.get_or_none(where if deleted else where & LIVING)
    if row is None:
        raise NotFound("There is no trigger with this id.")
    return row


def find_writable_trigger(trigger_id: str, caller: Principal) -> Trigger:
    """Return a trigger that the caller may change.

    Raise `NotFound` if no such trigger is visible to the caller, and `Forbidden` if the caller is neither its owner nor
    an admin.
    """
    row = find_readable_trigger(trigger_id, caller)
    require_owner(caller, row.created_by, what="trigger", manage="triggers.manage")
    return row


def count_fires_since(trigger_ids: Sequence[str], seconds: float) -> dict[str, int]:
    """Return how often each trigger fired within the last `seconds` seconds. Triggers that did not fire are omitted."""
    where = Fire.trigger_id.in_(list(trigger_ids)) & (Fire.status == "fired") & (Fire.fired_at > clock.now(-seconds))
    found: Any = Fire.select(Fire.trigger_id, peewee.fn.COUNT(Fire.id)).where(where).group_by(Fire.trigger_id)
    return {str(trigger_id): int(count) for trigger_id, count in found.tuples()}


def view_fields(row: Trigger, fires_24h: int, schedule_text: str | None) -> dict[str, Any]:
    """Return the fields of a `TriggerView`."""
    names = set(TriggerView.__struct_fields__) - {"filter", "fires_24h", "schedule_text"}
    return {
        **{name: getattr(row, name) for name in names},
        "filter": row.filter_expression,
        "overlap": cast(Overlap, row.overlap),
        "catch_up": cast(CatchUp, row.catch_up),
        "fires_24h": fires_24h,
        "schedule_text": schedule_text,
    }


def history_view(row: Fire) -> HistoryView:
    """Return the API representation of a history row."""
    return HistoryView(
        id=row.id,
        trigger_id=row.trigger_id,
        scheduled_for=row.scheduled_for,
        fired_at=row.fired_at,
        status=cast(Status, row.status),
        reason=row.reason,
        input_preview=row.input_preview,
        result=row.result,
        error=row.error,
        duration_ms=row.duration_ms,
        attempt=row.attempt,
    )
