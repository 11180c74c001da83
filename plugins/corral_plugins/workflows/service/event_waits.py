"""Completes the steps of the type `wait` that wait for an event.

Each step stores its position in the event log. No event is therefore missed, regardless of which process looks for the
event and when.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import peewee

from corral.auth.principal import SYSTEM_PRINCIPAL, Principal
from corral.auth.visibility import EventRights
from corral.database.engine import Database
from corral.database.unit import SYSTEM, UnitContext
from corral.errors import Problem, Unavailable
from corral.events import log as event_log
from corral.events.alerts import raise_alert
from corral.events.consumers import POISON_TRIES, poison_alert
from corral.events.log import EventRow, LoggedEvent
from corral_core.accounts.api import Accounts
from corral_core.expressions.api import Expressions
from corral_plugins.triggers.api import EventTaint
from corral_plugins.workflows.models import Run, StepRun
from corral_plugins.workflows.service.wakeups import wake

log = logging.getLogger("corral.workflows")
ENTRY = UnitContext(label="workflows: awaited events", actor=SYSTEM)
BATCH, EVENTS = 200, 500
LOOK_SECONDS = 1.0


class _Batch(NamedTuple):
    """Waiting steps, the new events of the types that they wait for, and the log position after these events.

    `callers` maps the id of each run to the person whose rights the run has. People who are no longer active are
    omitted.
    """

    rows: list[Any]
    events: list[LoggedEvent]
    place: int
    callers: Mapping[str, Principal]


class EventWaits:
    """Looks for the events that steps wait for.

    A step receives only events that the person who started its run may read. If an event cannot be handled for a step,
    the handling is retried, as in any durable consumer. After the last failed try, the step skips the event. Other
    steps are not delayed. The content of a tainted event taints the run.
    """

    event_taint: EventTaint | None

    def __init__(self, database: Database, expressions: Expressions, accounts: Accounts, rights: EventRights) -> None:
        self._database, self._work = database, database.work
        self._expressions, self._accounts, self._rights = expressions, accounts, rights
        self._failures: Counter[tuple[str, str]] = Counter()  # by step and event

    async def run(self) -> None:
        """Look for events until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.complete_waiting_steps()

    async def complete_waiting_steps(self) -> None:
        """Complete the steps whose awaited event has occurred."""
        last = ("", "")
        while await self._database.read(functools.partial(_is_awaited, last), ENTRY):
            batch = await self._work(functools.partial(self._load, last), entry=ENTRY, read=True)
            left = [row.id for row in batch.rows if await self._complete_or_move_on(row, batch)]
            if left:
                await self._work(functools.partial(_move_positions, left, batch.place), entry=ENTRY)
            if len(batch.rows) < BATCH:
                return
            last = (batch.rows[-1].event, batch.rows[-1].id)

    def _load(self, after: tuple[str, str]) -> _Batch:
        rows, events, place = _read(after)
        found: Any = Run.select(Run.id, Run.started_by).where(Run.id.in_({row.run_id for row in rows})).tuples()
        starters = dict(found) if rows else {}
        people = self._accounts.principals_of({user_id for user_id in starters.values() if user_id is not None})
        callers = {
            run_id: SYSTEM_PRINCIPAL if user_id is None else people[user_id]
            for run_id, user_id in starters.items()
            if user_id is None or user_id in people
        }
        return _Batch(rows, events, place, callers)

    async def _complete_or_move_on(self, row: Any, batch: _Batch) -> bool:
        """Complete a step if one of the events matches it.

        Return True if no event matches, so that the step's position in the event log can move on.
        """
        caller = batch.callers.get(row.run_id)
        for event in batch.events:
            is_candidate = event.type == row.event and event.seq > row.cursor
            if not is_candidate or caller is None or not self._rights.can_read(caller, event):
                continue
            try:
                if await self._matches(row, event):
                    await self._work(functools.partial(_complete_step, row, event, self.event_taint), entry=ENTRY)
                    self._failures.pop((row.id, event.id), None)
                    return False
            except Unavailable:
                raise
            except Exception as error:
                if not await self._count_failure(row, event, str(error)):
                    return False
        return True

    async def _count_failure(self, row: Any, event: LoggedEvent, reason: str) -> bool:
        """Count a failed attempt to handle an event for a step. Return whether the step now skips the event."""
        log.warning("an awaited event could not be handled", extra={"step": row.name, "run": row.run_id}, exc_info=True)
        self._failures[row.id, event.id] += 1
        if self._failures[row.id, event.id] < POISON_TRIES:
            return False
        await self._work(functools.partial(_alert_admins, row, event, reason), entry=ENTRY)
        del self._failures[row.id, event.id]
        return True

    async def _matches(self, row: Any, event: LoggedEvent) -> bool:
        condition = (row.input.get("event") or {}).get("filter") if isinstance(row.input, dict) else None
        if condition is None:
            return True
        await asyncio.sleep(0)  # many steps may wait for the same of many events
        about = {"event": _event_data(event)}
        try:
            return bool(await self._expressions.evaluate(condition, about, boolean=True))
        except Problem as error:
            log.warning(
                "the filter of a step failed", extra={"step": row.name, "run": row.run_id, "reason": str(error)}
            )
            return False


def _event_data(event: LoggedEvent) -> dict[str, Any]:
    """Return an event in the form that is available to filters and outputs."""
    return {
        "event": event.type,
        "id": event.id,
        "ts": event.ts,
        "actor": {"type": event.actor_type, "id": event.actor_id},
        "object": {"type": event.object_type, "id": event.object_id},
        "data": event.payload(),
    }


def _read(after: tuple[str, str]) -> tuple[list[Any], list[LoggedEvent], int]:
    """Return a batch of waiting steps, the new events of the awaited types, and the log position after these events.

    Steps that have already seen the newest event are omitted. The steps are ordered by event type and id.
    """
    end = event_log.last_seq()
    rows: list[Any] = list(_waiting_steps(after, end).order_by(StepRun.event, StepRun.id).limit(BATCH))
    if not rows:
        return [], [], end
    first, types = min(row.cursor for row in rows), sorted({row.event for row in rows})
    events = event_log.select([EventRow.seq > first, EventRow.seq <= end, EventRow.type.in_(types)], EVENTS)
    return rows, events, events[-1].seq if len(events) == EVENTS else end


def _is_awaited(after: tuple[str, str]) -> bool:
    """Return whether `_read` would return any steps."""
    return bool(_waiting_steps(after, event_log.last_seq()).limit(1).exists())


def _waiting_steps(after: tuple[str, str], end: int) -> Any:
    position = peewee.Tuple(StepRun.event, StepRun.id)
    waits = StepRun.event.is_null(False) & (StepRun.status == "waiting") & (position > peewee.Tuple(*after))
    return StepRun.select().where(waits & StepRun.report.is_null() & (StepRun.cursor < end))


def _move_positions(ids: Sequence[str], place: int) -> None:
    StepRun.update(cursor=place).where(StepRun.id.in_(list(ids)) & (StepRun.cursor < place)).execute()


def _complete_step(row: Any, event: LoggedEvent, event_taint: EventTaint | None) -> None:
    wake(row.run_id)
    is_tainted = event_taint is None or event_taint.is_tainted(event)
    output = {"event": _event_data(event)}
    waits = (StepRun.id == row.id) & (StepRun.status == "waiting") & StepRun.report.is_null()
    StepRun.update(report={"status": "completed", "tainted": is_tainted}, output=output).where(waits).execute()


def _alert_admins(row: Any, event: LoggedEvent, reason: str) -> None:
    about = {"type": "workflow_run", "id": row.run_id}
    alert = poison_alert(f"The step {row.name} of a workflow run", event, reason, about)
    raise_alert(alert, ("consumer", "workflows.awaited_events"))  # once for many steps
