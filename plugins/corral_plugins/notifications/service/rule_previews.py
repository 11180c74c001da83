"""Shows the messages that a rule would have sent for past events in the log. Runs outside units of work."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from corral import clock
from corral.database.engine import Work
from corral.database.model import PRIVATE
from corral.events import log as event_log
from corral.events.log import EventRow, LoggedEvent
from corral_core.event_log.api import last_seq_before
from corral_plugins.notifications.api import Severity
from corral_plugins.notifications.models import Rule
from corral_plugins.notifications.service.event_catalogue import severity_of
from corral_plugins.notifications.service.fan_out import RuleMatching
from corral_plugins.notifications.service.grouping import (
    CRITICAL,
    QUIET_KEY,
    SHOWN_ITEMS,
    group_key_of,
    higher_severity,
    state_hash_of,
)
from corral_plugins.notifications.service.quiet_hours import end_of_quiet_hours
from corral_plugins.notifications.shapes import PreviewedMessage, RulePreview

MAX_EVENTS, BATCH, MAX_MESSAGES, DAY = 5000, 500, 100, 86_400


class RulePreviews:
    """Applies a rule to past events."""

    def __init__(self, work: Work, matching: RuleMatching) -> None:
        self._work, self._matching = work, matching

    async def simulate(self, rule: Rule, days: int) -> RulePreview:
        """Return the messages that a rule would have sent for the events of the last `days` days.

        Disabled rules can be simulated as well.
        """
        rule.since_seq = 0
        since, names = clock.now(-days * DAY), sorted(self._matching.titles.names(rule.events))
        simulation, count, matched = _Simulation(rule), 0, 0
        after = await self._work(lambda: _position_before(since), read=True)
        while count < MAX_EVENTS:
            load = functools.partial(_load, names, after)
            events = await self._work(load, read=True)
            count += len(events)
            found = await self._matching.matches([rule], events)
            for event in events:
                if event.id in found:
                    matched += 1
                    data = event.payload()
                    title = self._matching.titles.describe(event, data).title
                    simulation.add(event, data, title)
            if len(events) < BATCH:
                break
            after = events[-1].seq
        messages = simulation.messages()
        return RulePreview(
            events=count,
            matched=matched,
            messages=len(messages),
            truncated=count >= MAX_EVENTS,
            items=messages[:MAX_MESSAGES],
        )


class _Message:
    """A message that collects events until it is due."""

    def __init__(self, key: str, due: float) -> None:
        self.key, self.due, self.count = key, due, 0
        self.titles: list[str] = []
        self.state_hashes: set[str] = set()
        self.severity: Severity = "info"


class _Simulation:
    """Groups past events as the rule would have grouped them at the time."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._open: dict[str, _Message] = {}
        self._last: dict[str, tuple[float, set[str]]] = {}
        self._sent: list[_Message] = []

    def add(self, event: LoggedEvent, data: Mapping[str, Any], title: str) -> None:
        """Add the next event. Events must be added in chronological order."""
        rule, at, object = self._rule, clock.parse_instant(event.ts), (event.object_type, event.object_id)
        severity = severity_of(event, data)
        ends = None if severity == CRITICAL else end_of_quiet_hours(rule.quiet_hours, at)
        key = QUIET_KEY if ends is not None else group_key_of(rule.group_by, event.type, object, data)
        message = self._open.get(key)
        if message is not None and message.due <= at:
            self._send(message)
            message = None
        if message is None:
            due = clock.parse_instant(ends) if ends is not None else at + rule.group_wait_seconds
            if ends is None and key in self._last:
                due = max(due, self._last[key][0] + rule.group_interval_seconds)
            message = self._open[key] = _Message(key, due)
        message.count += 1
        message.severity = higher_severity(message.severity, severity)
        message.state_hashes.add(
            state_hash_of(event.type, object, severity, title, data.get("kind"), data.get("status"))
        )
        if len(message.titles) < SHOWN_ITEMS:
            message.titles.append(title)

    def messages(self) -> list[PreviewedMessage]:
        """Return all messages, oldest first, for each channel of the rule."""
        for message in sorted(self._open.values(), key=lambda each: each.due):
            self._send(message)
        self._open = {}
        return [
            PreviewedMessage(
                sent_at=clock.format_instant(each.due),
                channel_id=channel_id,
                group_key=each.key,
                count=each.count,
                severity=each.severity,
                titles=each.titles,
            )
            for each in sorted(self._sent, key=lambda each: each.due)
            for channel_id in self._rule.channel_ids
        ]

    def _send(self, message: _Message) -> None:
        sent_at, state_hashes = self._last.get(message.key, (0.0, set[str]()))
        repeat = self._rule.repeat_interval_seconds
        is_same = message.key in self._last and message.state_hashes <= state_hashes and message.key != QUIET_KEY
        if is_same and (repeat == 0 or message.due < sent_at + repeat):
            return
        self._last[message.key] = (message.due, message.state_hashes)
        self._sent.append(message)


def _position_before(since: str) -> int:
    return last_seq_before(since, event_log.first_seq() - 1, event_log.last_seq())


def _load(names: Sequence[str], after: int) -> list[LoggedEvent]:
    may_read = EventRow.visibility != PRIVATE  # by an admin, who asks
    return event_log.select([EventRow.type.in_(names), EventRow.seq > after, may_read], BATCH) if names else []
