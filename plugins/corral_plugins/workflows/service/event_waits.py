"""Completes the steps of the type `wait` that wait for an event.

A step remembers its position in the event log, so no event is missed, whatever process looks for it and whenever.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Sequence
from typing import Any

import peewee

from corral.database.engine import Database
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem
from corral.events import log as event_log
from corral.events.log import EventRow, LoggedEvent
from corral_core.expressions.api import Expressions
from corral_plugins.workflows.models import StepRun
from corral_plugins.workflows.service.wakeups import wake

log = logging.getLogger("corral.workflows")
ENTRY = UnitContext(label="workflows: awaited events", actor=SYSTEM)
BATCH, EVENTS = 200, 500
LOOK_SECONDS = 1.0


class EventWaits:
    """Looks for the events that steps wait for."""

    def __init__(self, database: Database, expressions: Expressions) -> None:
        self._database, self._work, self._expressions = database, database.work, expressions

    async def run(self) -> None:
        """Look for events until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Complete the steps whose event has come."""
        last = ("", "")
        while True:
            rows, events, place = await self._database.read(functools.partial(_read, last), ENTRY)
            left = [row.id for row in rows if not await self._complete_one(row, events)]
            if left:
                await self._work(functools.partial(_move, left, place), entry=ENTRY)
            if len(rows) < BATCH:
                return
            last = (rows[-1].event, rows[-1].id)

    async def _complete_one(self, row: Any, events: Sequence[LoggedEvent]) -> bool:
        """Complete a step with the first event that it waits for. Return whether there is one."""
        for event in events:
            if event.type == row.event and event.seq > row.cursor and await self._matches(row, event):
                await self._work(functools.partial(_complete, row, event), entry=ENTRY)
                return True
        return False

    async def _matches(self, row: Any, event: LoggedEvent) -> bool:
        condition = (row.input.get("event") or {}).get("filter") if isinstance(row.input, dict) else None
        if condition is None:
            return True
        await asyncio.sleep(0)  # many steps may wait for the same of many events
        about = {"event": _shown(event)}
        try:
            return bool(await self._expressions.evaluate(condition, about, boolean=True))
        except Problem as error:
            log.warning(
                "the filter of a step failed", extra={"step": row.name, "run": row.run_id, "reason": str(error)}
            )
            return False


def _shown(event: LoggedEvent) -> dict[str, Any]:
    """Return an event as filters and outputs show it."""
    return {
        "event": event.type,
        "id": event.id,
        "ts": event.ts,
        "actor": {"type": event.actor_type, "id": event.actor_id},
        "object": {"type": event.object_type, "id": event.object_id},
        "data": event.payload(),
    }


def _read(after: tuple[str, str]) -> tuple[list[Any], list[LoggedEvent], int]:
    """Return a batch of waiting steps, the new events of the types for which they wait, and the position after these.

    A step that has seen the newest event is left out. The steps come in the order of the index of steps that wait.
    """
    end = event_log.last_seq()
    position = peewee.Tuple(StepRun.event, StepRun.id)
    waits = StepRun.event.is_null(False) & (StepRun.status == "waiting") & (position > peewee.Tuple(*after))
    found = StepRun.select().where(waits & StepRun.report.is_null() & (StepRun.cursor < end))
    rows: list[Any] = list(found.order_by(StepRun.event, StepRun.id).limit(BATCH))
    if not rows:
        return [], [], end
    first, types = min(row.cursor for row in rows), sorted({row.event for row in rows})
    events = event_log.select([EventRow.seq > first, EventRow.seq <= end, EventRow.type.in_(types)], EVENTS)
    return rows, events, events[-1].seq if len(events) == EVENTS else end


def _move(ids: Sequence[str], place: int) -> None:
    StepRun.update(cursor=place).where(StepRun.id.in_(list(ids)) & (StepRun.cursor < place)).execute()


def _complete(row: Any, event: LoggedEvent) -> None:
    wake(row.run_id)
    output = {"event": _shown(event)}
    waits = (StepRun.id == row.id) & (StepRun.status == "waiting") & StepRun.report.is_null()
    StepRun.update(report={"status": "completed"}, output=output).where(waits).execute()
