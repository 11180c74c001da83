"""Records slots, which are the times, events and deliveries on which triggers fire.

For each slot, a pending history row and a job that fires the slot are inserted. The row also acts as a lock, because a
slot can have only one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.database.model import JSONField
from corral.database.statement import Statement
from corral.ids import new_id
from corral.jobs.job import enqueue
from corral.plugin import Settings
from corral_plugins.triggers.models import Fire, Trigger
from corral_plugins.triggers.settings import MAX_CHAIN

FIRE_JOB = "triggers.fire"
BATCH_SIZE = 20  # slots that a job, and a unit of work, fires
UNIT_SECONDS = 0.2
"""The number of seconds after which a unit of work leaves its remaining slots to the next one.

A unit of work that takes too long is rolled back completely. Without this limit, every unit with many slots could be
rolled back on a busy machine.
"""
COLUMNS = tuple(field.name for field in Fire._meta.sorted_fields)
JSON_COLUMNS = frozenset(field.name for field in Fire._meta.sorted_fields if isinstance(field, JSONField))

_INSERT = Statement(
    lambda p: Fire.insert({getattr(Fire, name): p(name) for name in COLUMNS}).on_conflict_ignore().returning(Fire.id)
)


class TriggerSlots:
    """Records the slots of triggers. Every method runs in the caller's unit of work.

    A slot is a time, an event or a delivery on which a trigger fires.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def record(
        self,
        trigger: Trigger,
        slot: str,
        *,
        scheduled_for: str | None = None,
        cause: Sequence[str] = (),
        status: str = "pending",
        reason: str | None = None,
        announce: bool = True,
        **fields: Any,
    ) -> Fire | None:
        """Insert a row for a slot, and a job if the row is pending. Return None if the slot already has a row.

        If `announce` is not set, no job is inserted, and the caller must call `enqueue_fires` with all rows of its unit
        of work. If `cause` contains this trigger or is too long, the slot does not fire, and its row gets the status
        `loop`.
        """
        now = clock.now()
        if status == "pending" and (why := self.loop_reason(trigger.id, cause)) is not None:
            status, reason, fields["payload"], fields["event"] = "loop", why, None, None
        row = Fire(
            id=new_id(),
            trigger_id=trigger.id,
            slot=slot,
            created_at=now,
            scheduled_for=scheduled_for or now,
            due_at=now,
            status=status,
            reason=reason,
            cause=list(cause),
            **fields,
        )
        if _INSERT.one({name: _stored_form(name, getattr(row, name)) for name in COLUMNS}) is None:
            return None
        if status == "pending":
            if announce:
                enqueue_fires([row])
        elif status != "duplicate":
            Trigger.update(last_status=status).where(Trigger.id == trigger.id).execute()
        return row

    def loop_reason(self, trigger_id: str, cause: Sequence[str]) -> str | None:
        """Return the reason why an event with this cause chain must not fire a trigger, or None if it may."""
        if trigger_id in cause:
            return "The event was caused by this trigger."
        most = self._settings.get(MAX_CHAIN)
        return f"The chain of causes is longer than {most} (triggers.max_chain)." if len(cause) > most else None


def enqueue_fires(rows: Sequence[Fire]) -> None:
    """Enqueue jobs that fire the pending slots among the given slots."""
    ids = [row.id for row in rows if row.status == "pending"]
    for begin in range(0, len(ids), BATCH_SIZE):
        enqueue(FIRE_JOB, ids=ids[begin : begin + BATCH_SIZE])


def _stored_form(column: str, value: Any) -> Any:
    """Return a column value in the form in which the database stores it."""
    return msgspec.json.encode(value).decode() if column in JSON_COLUMNS and value is not None else value
