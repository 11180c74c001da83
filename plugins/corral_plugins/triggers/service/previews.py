"""Tests triggers without starting anything: renders actions, searches the event log, or lists the next fire times."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import msgspec

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.errors import Invalid
from corral.events import log as event_log
from corral.events.event import EventTypes
from corral.events.log import EventRow, LoggedEvent
from corral.ids import new_id
from corral_core.event_log.api import last_seq_before
from corral_core.expressions.api import Expressions, TemplateError
from corral_plugins.triggers.models import Fire, Trigger
from corral_plugins.triggers.service.event_reader import Owners, TriggerEvents, event_causes, event_facts
from corral_plugins.triggers.service.firing import TriggerFiring, error_text, filters_of, fire_data
from corral_plugins.triggers.service.kinds import TriggerTypeRegistry
from corral_plugins.triggers.service.rows import DAY, count_fires_since, find_readable_trigger
from corral_plugins.triggers.service.scheduler import TriggerTimes
from corral_plugins.triggers.service.slot_batches import HOUR, unfinished_fires
from corral_plugins.triggers.service.slots import TriggerSlots
from corral_plugins.triggers.service.timed_kinds import next_times
from corral_plugins.triggers.shapes import TestedEvent, TestTrigger, TriggerTest

READ_AT_ONCE = 200
MAX_READ, MAX_FOUND = 5000, 200


class TriggerPreviews:
    """Tests triggers. Call `test` outside units of work."""

    def __init__(
        self,
        work: Work,
        types: TriggerTypeRegistry,
        times: TriggerTimes,
        firing: TriggerFiring,
        events: TriggerEvents,
        slots: TriggerSlots,
        expressions: Expressions,
        event_types: EventTypes,
    ) -> None:
        self._work, self._types, self._times, self._firing = work, types, times, firing
        self._events, self._slots, self._expressions, self._event_types = events, slots, expressions, event_types

    async def test(self, trigger_id: str, asked: TestTrigger, *, by: Principal) -> TriggerTest:
        """Return what the trigger would do with the given input, without starting anything.

        Raise `Invalid` if the input sets more than one of `payload`, `days` and `next`, or one that does not suit the
        type of the trigger.
        """
        if sum(value is not msgspec.UNSET for value in (asked.payload, asked.days, asked.next)) > 1:
            raise Invalid.at("", "not_allowed", "Give a payload, or days, or next.")
        trigger = await self._work(lambda: find_readable_trigger(trigger_id, by), read=True)
        if (count := asked.next) is not msgspec.UNSET:
            return await self._work(lambda: self._next_times(trigger, count), read=True)
        if (days := asked.days) is not msgspec.UNSET:
            return await self._find_past_events(trigger, days)
        return await self._test_with_payload(trigger, asked.payload if asked.payload is not msgspec.UNSET else {})

    def _next_times(self, trigger: Trigger, count: int) -> TriggerTest:
        kind = self._types.kind(trigger.type)
        if kind is None or kind.next_time is None:
            raise Invalid.at("/next", "not_allowed", f"A trigger of the type {trigger.type} has no times.")
        times = next_times(kind, self._times.rule(trigger), clock.time_s(), count)
        return TriggerTest(times=[clock.format_instant(at) for at in times])

    async def _test_with_payload(self, trigger: Trigger, payload: dict[str, Any]) -> TriggerTest:
        now = clock.now()
        row = Fire(id=new_id(), trigger_id=trigger.id, scheduled_for=now, payload=payload, event={}, is_manual=False)
        prepared = await self._firing.prepare(trigger, row)
        if prepared.error is not None:
            return TriggerTest(would="failed", error=error_text(prepared.error))
        if prepared.outcome == "filtered":
            return TriggerTest(would="filtered")
        action = {"type": trigger.action["type"], **prepared.fields}
        would = await self._work(lambda: self._predict_status(trigger), read=True)
        return TriggerTest(would=would, action=action)

    def _predict_status(self, trigger: Trigger) -> Any:
        if count_fires_since([trigger.id], HOUR).get(trigger.id, 0) >= trigger.max_fires_per_hour:
            return "rate_limited"
        action = self._types.require_action(trigger.action["type"])
        is_blocked = trigger.overlap == "skip" and bool(unfinished_fires({trigger.id: action}, mark=False))
        return "skipped_overlap" if is_blocked else "fired"

    async def _find_past_events(self, trigger: Trigger, days: int) -> TriggerTest:
        """Find the events of the last `days` days that would have fired an event trigger."""
        if trigger.type != "event":
            raise Invalid.at("/days", "not_allowed", "Only triggers of the type event are tested with past events.")
        found: list[TestedEvent] = []
        after, read = await self._work(lambda: _first_position(clock.now(-days * DAY)), read=True), 0
        names = self._event_types.expand([trigger.config["event"]])
        while read < MAX_READ and len(found) < MAX_FOUND:
            batch, followed = await self._work(functools.partial(self._next_events, trigger, after, names), read=True)
            for event in followed:
                if await self._matches(trigger, event):
                    found.append(TestedEvent(event_id=event.id, event=event.type, ts=event.ts))
            if len(batch) < READ_AT_ONCE:
                return TriggerTest(events=found[:MAX_FOUND], has_more=len(found) > MAX_FOUND)
            after, read = batch[-1].seq, read + len(batch)
        return TriggerTest(events=found[:MAX_FOUND], has_more=True)

    def _next_events(
        self, trigger: Trigger, after: int, names: list[str]
    ) -> tuple[Sequence[LoggedEvent], Sequence[LoggedEvent]]:
        """Return the next events with these names, and the subset that could fire the trigger."""
        owners: Owners = {}
        events = event_log.select([EventRow.seq > after, EventRow.type.in_(names)], READ_AT_ONCE)
        return events, [event for event in events if self._is_followed(trigger, event, owners)]

    async def _matches(self, trigger: Trigger, event: LoggedEvent) -> bool:
        """Return whether the filters of a trigger accept an event."""
        row = Fire(scheduled_for=event.ts, payload=event.payload(), event=event_facts(event))
        data = fire_data(trigger, row)
        try:
            for text in filters_of(trigger):
                if not await self._expressions.evaluate(text, data, boolean=True):
                    return False
        except TemplateError:
            return False
        return True

    def _is_followed(self, trigger: Trigger, event: LoggedEvent, owners: Owners) -> bool:
        is_loop = self._slots.loop_reason(trigger.id, event_causes(event)) is not None
        return not is_loop and self._events.is_readable(trigger, event, owners)


def _first_position(since: str) -> int:
    """Return the position in the event log just before the first event at or after this time."""
    return last_seq_before(since, event_log.first_seq() - 1, event_log.last_seq())
