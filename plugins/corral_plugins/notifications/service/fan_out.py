"""Reads the event log, and writes the in-app notifications and the outgoing messages.

The position in the log is the cursor of a durable consumer. The cursor moves in the transaction that writes the
notifications, so each event is handled once. The conditions of rules are evaluated between reading and writing, because
expressions must not be evaluated in a unit of work. Several processes may read the same events at the same time, but
only one of them writes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from corral import clock
from corral.database.engine import Database
from corral.database.model import PRIVATE
from corral.database.unit import SYSTEM, UnitContext
from corral.events import log as event_log
from corral.events.event import EventTypes
from corral.events.log import EventRow, LoggedEvent
from corral.plugin import Settings
from corral_core.event_log.api import LogCursor, PositionMoved, handle_next
from corral_core.expressions.api import Expressions, TemplateError
from corral_plugins.notifications.models import Channel, Rule
from corral_plugins.notifications.service.audience import Audience, recipient_roles
from corral_plugins.notifications.service.channel_types import MAIL_BREAKER, ChannelTypeRegistry
from corral_plugins.notifications.service.event_catalogue import (
    CHANNEL_FAILING,
    DEFAULTS,
    OWN_EVENT,
    NotificationContent,
    describe,
    is_at_least,
    severity_of,
)
from corral_plugins.notifications.service.grouping import (
    CRITICAL,
    QUIET_KEY,
    Bundle,
    Target,
    group_key_of,
    write_bundles,
)
from corral_plugins.notifications.service.inbox import Inbox, NewNotification
from corral_plugins.notifications.service.mentions import MENTION, MENTIONING, Mentions, mentioned_names
from corral_plugins.notifications.service.quiet_hours import end_of_quiet_hours
from corral_plugins.notifications.service.recipient_chunks import (
    ROWS_AT_ONCE,
    divide_into_chunks,
    progress_of,
    store_progress,
)
from corral_plugins.notifications.service.recipients import MAX_PEOPLE, People, Person, individual_recipients
from corral_plugins.notifications.settings import DEFAULT_NOTIFICATIONS

log = logging.getLogger("corral.notifications")

CONSUMER = "notifications.fan_out"
CURSOR = LogCursor(CONSUMER)
CAUSE = "notifications"
ENTRY = UnitContext(label="notifications.fan_out", actor=SYSTEM)
EVENTS_AT_ONCE, FEW_EVENTS, WINDOW = 50, 500, 20_000
NO_MAIL_CHECKS = ("mail",)
CONDITION_ROOTS = ("event", "data", "severity")


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Events to handle, the rules that may apply to them, and the positions in the event log before and after them."""

    events: list[LoggedEvent]
    rules: list[Rule]
    before: int
    reached: int
    more: bool


class TitledEvents:
    """Expands patterns to the names of events, and provides the titles of events."""

    def __init__(self, types: EventTypes) -> None:
        self._types = types

    def names(self, patterns: Iterable[str]) -> frozenset[str]:
        """Return the names of the events that match the patterns, except the event that announces a notification."""
        return frozenset(self._types.expand(patterns)) - {OWN_EVENT}

    def describe(self, event: LoggedEvent, data: Mapping[str, Any]) -> NotificationContent:
        """Return the title and the text of the notification about an event."""
        title = next((each.title for each in self._types.all() if each.event == event.type), event.type)
        return describe(event, data, title)


class RuleMatching:
    """Finds the rules that apply to events. No method may be called in a unit of work."""

    def __init__(self, expressions: Expressions, types: EventTypes) -> None:
        self._expressions, self.titles = expressions, TitledEvents(types)

    async def matches(self, rules: Sequence[Rule], events: Sequence[LoggedEvent]) -> dict[str, list[Rule]]:
        """Map the id of each event to the rules that apply to the event."""
        names = {rule.id: self.titles.names(rule.events) for rule in rules}
        found: dict[str, list[Rule]] = {}
        for event in events:
            data = event.payload()
            for rule in rules:
                if event.type in names[rule.id] and await self._meets(rule, event, data):
                    found.setdefault(event.id, []).append(rule)
        return found

    async def _meets(self, rule: Rule, event: LoggedEvent, data: Mapping[str, Any]) -> bool:
        severity = severity_of(event, data)
        if event.seq <= rule.since_seq or not is_at_least(severity, rule.min_severity):
            return False
        if rule.conditions is None:
            return True
        values = {"event": _condition_data(event), "data": data, "severity": severity}
        try:
            return bool(await self._expressions.evaluate(rule.conditions, values, boolean=True))
        except TemplateError as error:
            log.warning("the conditions of a rule failed", extra={"rule": rule.id, "reason": str(error)})
            return False


class NotificationFanOut:
    """Turns events into notifications."""

    def __init__(
        self,
        database: Database,
        settings: Settings,
        matching: RuleMatching,
        people: People,
        mentions: Mentions,
        inbox: Inbox,
        channel_types: ChannelTypeRegistry,
    ) -> None:
        self._database, self._work = database, database.work
        self._settings, self._matching = settings, matching
        self._people, self._mentions, self._inbox, self._channel_types = people, mentions, inbox, channel_types

    async def create_cursor(self) -> None:
        """If no position is stored, start at the end of the event log, so that no later event is missed."""
        if not await self._work(CURSOR.exists, entry=ENTRY, read=True):  # a start on a full disk only reads
            await self._work(CURSOR.create, entry=ENTRY)

    async def handle_new_events(self, *, pass_over: bool = False) -> None:
        """Handle all new events. If another process handles them at the same time, leave the rest to that process.

        If the log contains only a few new events and nobody is notified about them, the stored position moves past them
        only if `pass_over` is true. Without occasional calls with `pass_over`, the position could fall so far behind
        that old events could not be deleted from the log.
        """

        async def skip(reason: str) -> bool:
            return await self._work(functools.partial(self._count_failure, reason), entry=ENTRY)

        if not await self._database.read(CURSOR.is_behind, ENTRY):
            return
        with contextlib.suppress(PositionMoved):
            while await handle_next(functools.partial(self._read_batch, pass_over), skip, EVENTS_AT_ONCE):
                pass

    def followed_names(self) -> frozenset[str]:
        """Return the names of the events that can cause notifications. Runs in a unit of work."""
        patterns = {pattern for rule in _enabled_rules() for pattern in rule.events}
        return self._names(patterns)

    # -- parts

    def _names(self, patterns: Iterable[str]) -> frozenset[str]:
        mentioning = MENTIONING if self._is_default(MENTION) else ()
        return self._matching.titles.names([*patterns, *self._default_names(), *mentioning])

    def _default_names(self) -> list[str]:
        return [name for name in DEFAULTS if self._is_default(name)]

    def _is_default(self, entry: str) -> bool:
        return self._settings.get(DEFAULT_NOTIFICATIONS).get(entry, True)

    async def _read_batch(self, pass_over: bool, limit: int) -> bool:
        """Handle the next events. Return whether more events might follow."""
        batch = await self._work(lambda: self._load(limit, pass_over), entry=ENTRY, read=True)
        if batch.reached == batch.before:
            return False
        return await self._handle(batch) < batch.reached or batch.more

    def _count_failure(self, reason: str) -> bool:
        """Count a failure to handle the next event. Return True if the event is now skipped."""
        batch = self._load(1)
        return bool(batch.events) and CURSOR.count_failure(batch.before, batch.events[0], reason)

    def _load(self, limit: int, pass_over: bool = False) -> Batch:
        before = CURSOR.position()
        newest = event_log.last_seq()  # read first, because later events must come after the position
        rules = _enabled_rules()
        names = self._names(each for rule in rules for each in rule.events)
        until = min(newest, before + WINDOW)
        where = [EventRow.seq > before, EventRow.seq <= until, EventRow.type.in_(sorted(names))]
        events = event_log.select(where, limit) if names and until > before else []
        is_whole = len(events) < limit
        reached = until if is_whole else events[-1].seq
        if is_whole and not events and not pass_over and until - before < FEW_EVENTS:
            reached = before  # the position moves with the next events, so that most events cause no write
        return Batch(events=events, rules=rules, before=before, reached=reached, more=reached < newest)

    async def _handle(self, batch: Batch) -> int:
        """Write the notifications for the first events of a batch, and return the new position."""
        events = [event for event in batch.events if not _is_about_itself(event)]
        matched = await self._matching.matches(batch.rules, events)
        texts: dict[str, str] = {}
        if any(event.type in MENTIONING for event in events):
            texts = await self._work(lambda: self._mentions.texts(events), entry=ENTRY, read=True)
        names = {event_id: found for event_id, text in texts.items() if (found := mentioned_names(text))}
        roles = {
            role: await self._users_with_role(role)
            for role in recipient_roles(events, matched, frozenset(self._default_names()))
        }
        plan = await self._work(lambda: self._plan(batch, events, matched, names, roles), entry=ENTRY, read=True)
        done = plan.done
        for chunk in plan.chunks:
            await self._work(functools.partial(self._write, batch, plan, chunk, done, matched), entry=ENTRY)
            done = chunk[-1] if chunk else done
        return plan.reached

    async def _users_with_role(self, role: str) -> list[str]:
        """Return the ids of at most 10,000 active users with a role.

        Each page is read in a separate unit of work.
        """
        found: list[str] = []
        cursor: str | None = ""
        while cursor is not None and len(found) < MAX_PEOPLE:
            read = functools.partial(self._people.with_role, role, cursor)
            more, cursor = await self._work(read, entry=ENTRY, read=True)
            found += more
        return found

    def _plan(
        self,
        batch: Batch,
        events: Sequence[LoggedEvent],
        matched: Mapping[str, Sequence[Rule]],
        names: Mapping[str, set[str]],
        roles: Mapping[str, Sequence[str]],
    ) -> _Plan:
        """Choose how many events to handle in one unit of work, beginning with the first. At least one event is chosen.

        If a single event has too many recipients, they are notified in several units of work.
        """
        outgoing = _Outgoing(self._channel_types, events, matched)
        personal = {key: [rule for rule in rules if outgoing.needs_people(rule)] for key, rules in matched.items()}
        mentioned = self._mentions.people(names) if names and self._is_default(MENTION) else {}
        audience = Audience(self._people, events, personal, frozenset(self._default_names()), mentioned, roles)
        done, reached, size = progress_of(events[0].id) if events else None, batch.reached, 0
        chosen: list[LoggedEvent] = []
        for event in events:
            size += len(audience.people_for(event)) * audience.max_rows_per_person(event)
            if chosen and (size > ROWS_AT_ONCE or done is not None):
                reached = event.seq - 1
                break
            chosen.append(event)
        rows = sum(audience.max_rows_per_person(event) for event in chosen)
        ids = {each for event in chosen for each in audience.people_for(event)}
        chunks = divide_into_chunks(
            ids, max(1, ROWS_AT_ONCE // max(1, rows)) if len(chosen) == 1 else len(ids) or 1, after=done
        )
        return _Plan(events=chosen, audience=audience, chunks=chunks, reached=reached, done=done)

    def _write(
        self, batch: Batch, plan: _Plan, chunk: list[str], done: str | None, matched: Mapping[str, Sequence[Rule]]
    ) -> None:
        """Notify a chunk of people, unless another process has already notified them."""
        is_last = chunk is plan.chunks[-1]
        CURSOR.move(batch.before, plan.reached if is_last else batch.before)
        if not plan.events:
            return
        if progress_of(plan.events[0].id) != done:
            raise PositionMoved
        if not is_last or done is not None:
            store_progress(plan.events[0].id, None if is_last else chunk[-1])
        plan.audience.load(chunk)
        outgoing = _Outgoing(self._channel_types, plan.events, matched, to_all=done is None)
        told: list[NewNotification] = []
        for event in plan.events:
            data, rules = event.payload(), matched.get(event.id, ())
            described = self._matching.titles.describe(event, data)
            told += plan.audience.in_app(event, data, described, rules)
            for rule in rules:
                outgoing.add(event, data, described, rule, plan.audience.recipients_of(event, data, rule))
        self._inbox.add(told)
        write_bundles(outgoing.bundles, {rule.id: rule for rules in matched.values() for rule in rules})


class _Plan(msgspec.Struct, frozen=True, kw_only=True):
    """The events to handle, the people to notify, and the position in the event log after the events.

    `done` is the id of the last person already notified of the first event, or None if nobody was notified yet.
    """

    events: list[LoggedEvent]
    audience: Audience
    chunks: list[list[str]]
    reached: int
    done: str | None


class _Outgoing:
    """The outgoing messages to which the events of a batch are added.

    Each event is sent through a channel to a person only once. A channel with a fixed destination, such as a Slack
    channel, gets only events that all admins may read, because its readers are unknown. Its message is written together
    with the messages to the first chunk of people; for the other chunks, `to_all` is false and such channels are
    skipped.
    """

    def __init__(
        self,
        channel_types: ChannelTypeRegistry,
        events: Sequence[LoggedEvent],
        matched: Mapping[str, Sequence[Rule]],
        *,
        to_all: bool = True,
    ) -> None:
        self._to_all = to_all
        ids = {each for rules in matched.values() for rule in rules for each in rule.channel_ids}
        if ids:
            ids |= {event.object_id for event in events if event.object_type == "notification_channel"}
        rows = Channel.select().where(Channel.id.in_(sorted(ids))) if ids else ()
        self._channels = {row.id: row for row in rows}
        self._breakers = {row.id: channel_types.breaker_of(row) for row in self._channels.values()}
        self._sent: set[tuple[str, str, str | None]] = set()
        self.bundles: dict[Target, Bundle] = {}

    def needs_people(self, rule: Rule) -> bool:
        """Return whether a rule notifies its recipients individually."""
        channels = [self._channels[each] for each in rule.channel_ids if each in self._channels]
        return rule.in_app or any(channel.config.get("to_recipients") for channel in channels)

    def add(
        self,
        event: LoggedEvent,
        data: Mapping[str, Any],
        described: NotificationContent,
        rule: Rule,
        people: Sequence[Person],
    ) -> None:
        """Add an event to the messages of a rule."""
        object = (event.object_type, event.object_id)
        key = group_key_of(rule.group_by, event.type, object, data)
        silent = _silenced_breakers(event, data)
        if data.get("kind") == CHANNEL_FAILING and event.object_id in self._breakers:
            silent = {self._breakers[event.object_id]}
        item = {
            "event_id": event.id,
            "event": event.type,
            "title": described.title,
            "body": described.body,
            "href": described.href,
            "at": event.ts,
        }
        state = [data.get("kind"), data.get("status")]
        for channel_id in rule.channel_ids:
            channel = self._channels.get(channel_id)
            if channel is None or self._breakers[channel_id] in silent:
                continue
            for person in individual_recipients(channel, people, described.severity):
                told = (event.id, channel_id, None if person is None else person.id)
                if told not in self._sent and (person is not None or (self._to_all and event.visibility != PRIVATE)):
                    self._sent.add(told)
                    target = _event_target(rule, channel_id, person, key, described.severity)
                    self.bundles.setdefault(target, Bundle()).add(item, described.severity, object, state)


def _event_target(rule: Rule, channel_id: str, person: Person | None, key: str, severity: str) -> Target:
    """Return the channel, the person and the group of messages to which an event is added.

    During quiet hours, all events except critical ones are collected in one summary, which is sent when quiet hours
    end.
    """
    hold = None
    if severity != CRITICAL:
        ends = [end_of_quiet_hours(rule.quiet_hours, clock.time_s())]
        ends.append(end_of_quiet_hours(person.quiet_hours, clock.time_s()) if person is not None else None)
        hold = max((each for each in ends if each is not None), default=None)
    return Target(
        rule_id=rule.id,
        channel_id=channel_id,
        user_id=None if person is None else person.id,
        group_key=key if hold is None else QUIET_KEY,
        hold_until=hold,
    )


def _is_about_itself(event: LoggedEvent) -> bool:
    """Return whether an event was caused by a notification. Alerts about failing channels do not count."""
    causes = msgspec.json.decode(event.cause, type=list[str])
    return event.type == OWN_EVENT or (CAUSE in causes and event.payload().get("kind") != CHANNEL_FAILING)


def _silenced_breakers(event: LoggedEvent, data: Mapping[str, Any]) -> set[str]:
    """Return the circuit breakers that an event is about. The channels that they guard must not send the event."""
    if event.type.startswith("circuit."):
        return {str(data.get("name"))}
    if event.type != "system.alert":
        return set()
    if data.get("kind") == "circuit_open":
        return {event.object_id}
    return {MAIL_BREAKER} if data.get("check") in NO_MAIL_CHECKS else set()


def _enabled_rules() -> list[Rule]:
    return list(Rule.select().where(Rule.enabled).order_by(Rule.created_at, Rule.id))


def _condition_data(event: LoggedEvent) -> dict[str, Any]:
    """Return the value of the variable `event` in the conditions of rules."""
    return {
        "event": event.type,
        "id": event.id,
        "ts": event.ts,
        "actor": {"type": event.actor_type, "id": event.actor_id},
        "object": {"type": event.object_type, "id": event.object_id},
    }
