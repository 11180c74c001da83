"""Completes the steps of the type `wait` that wait for an event.

A step remembers its position in the event log, so no event is missed, whatever process looks for it and whenever.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from typing import Any

import peewee

from corral.database.engine import Work
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

    def __init__(self, work: Work, expressions: Expressions) -> None:
        self._work, self._expressions = work, expressions

    async def run(self) -> None:
        """Look for events until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Complete the steps whose event has come."""
        last = ("", "")
        while True:
            found = await self._work(functools.partial(_waiting_steps, last), entry=ENTRY, read=True)
            for row in found:
                await self._look_for(row)
            if len(found) < BATCH:
                return
            last = (found[-1].event, found[-1].id)

    async def _look_for(self, row: Any) -> None:
        events, end = await self._work(lambda: _events_for(row), entry=ENTRY, read=True)
        for event in events:
            if await self._matches(row, event):
                await self._work(functools.partial(_complete, row, event), entry=ENTRY)
                return
        place = events[-1].seq if len(events) == EVENTS else end
        if place > row.cursor:
            await self._work(functools.partial(_move, row, place), entry=ENTRY)

    async def _matches(self, row: Any, event: LoggedEvent) -> bool:
        condition = (row.input.get("event") or {}).get("filter") if isinstance(row.input, dict) else None
        if condition is None:
            return True
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


def _waiting_steps(after: tuple[str, str]) -> list[Any]:
    """Return the next steps that wait for events, in the order of the index that contains these steps alone."""
    place = peewee.Tuple(StepRun.event, StepRun.id)
    waits = StepRun.event.is_null(False) & (StepRun.status == "waiting") & (place > peewee.Tuple(*after))
    steps = StepRun.select().where(waits & StepRun.report.is_null())
    return list(steps.order_by(StepRun.event, StepRun.id).limit(BATCH))


def _events_for(row: Any) -> tuple[list[LoggedEvent], int]:
    end = event_log.last_seq()
    found = event_log.select([EventRow.seq > row.cursor, EventRow.seq <= end, EventRow.type == row.event], EVENTS)
    return found, end


def _move(row: Any, place: int) -> None:
    StepRun.update(cursor=place).where((StepRun.id == row.id) & (StepRun.cursor == row.cursor)).execute()


def _complete(row: Any, event: LoggedEvent) -> None:
    wake(row.run_id)
    output = {"event": _shown(event)}
    waits = (StepRun.id == row.id) & (StepRun.status == "waiting") & StepRun.report.is_null()
    StepRun.update(report={"status": "completed"}, output=output).where(waits).execute()
