"""Determines the people to notify about a batch of events, and the in-app notifications that each of them receives."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from corral.events.log import LoggedEvent
from corral_plugins.notifications.models import Rule
from corral_plugins.notifications.service.event_catalogue import (
    DEFAULTS,
    NotificationContent,
    notifies_by_default,
    title_of_mention,
)
from corral_plugins.notifications.service.grouping import group_key_of
from corral_plugins.notifications.service.inbox import NewNotification
from corral_plugins.notifications.service.mentions import MENTION
from corral_plugins.notifications.service.recipients import People, Person


class Audience:
    """The people to notify about a batch of events. `matched` contains the rules that notify individual people.

    `roles` maps each role to the ids of its members. People are loaded with their permissions in chunks, so that each
    unit of work stays short.
    """

    def __init__(
        self,
        people: People,
        events: Sequence[LoggedEvent],
        matched: Mapping[str, Sequence[Rule]],
        defaults: Collection[str],
        mentioned: Mapping[str, set[str]],
        roles: Mapping[str, Sequence[str]],
    ) -> None:
        self._people, self._matched, self._mentioned = people, matched, mentioned
        self._persons: dict[str, Person] = {}
        self._roles = roles
        told = [event for event in events if event.type in defaults and notifies_by_default(event, event.payload())]
        self._default_recipients = {
            event.id: people.default_recipients(event, event.payload(), roles) for event in told
        }

    def people_for(self, event: LoggedEvent) -> set[str]:
        """Return the ids of the people to whom an event is relevant.

        The result can include people who are not allowed to read the event.
        """
        found = self._default_recipients.get(event.id, set()) | self._mentioned.get(event.id, set())
        return found.union(*(self._named_recipients(event, rule) for rule in self._matched.get(event.id, ())))

    def max_rows_per_person(self, event: LoggedEvent) -> int:
        """Return the maximum number of notifications and deliveries that an event creates for each person."""
        return 1 + sum(len(rule.channel_ids) for rule in self._matched.get(event.id, ()))

    def load(self, user_ids: Collection[str]) -> None:
        """Load the people in the next chunk, with their permissions and preferences."""
        self._persons = self._people.load(user_ids)

    def recipients_of(self, event: LoggedEvent, data: Mapping[str, Any], rule: Rule) -> list[Person]:
        """Return a rule's recipients who may be notified of an event."""
        return self._may_be_notified(event, data, self._named_recipients(event, rule), event.type)

    def in_app(
        self, event: LoggedEvent, data: Mapping[str, Any], described: NotificationContent, rules: Sequence[Rule]
    ) -> list[NewNotification]:
        """Return the in-app notifications about an event: one for each person, regardless of how many rules apply."""
        groups: dict[str, str] = {}
        for rule in rules:
            if rule.in_app:
                by_keys = bool(rule.group_by)
                object = (event.object_type, event.object_id)
                key = f"{rule.id} {group_key_of(rule.group_by, event.type, object, data)}" if by_keys else ""
                for user_id in self._named_recipients(event, rule):
                    groups[user_id] = groups.get(user_id) or key
        for user_id in self._default_recipients.get(event.id, set()):
            groups.setdefault(user_id, "")
        told = {person.id: event.type for person in self._may_be_notified(event, data, groups, event.type)}
        mentioned = self._mentioned.get(event.id, set()) - told.keys()
        cause = tuple(msgspec.json.decode(event.cause, type=list[str]))
        told |= {person.id: MENTION for person in self._may_be_notified(event, data, mentioned, MENTION)}
        return [
            NewNotification(
                user_id=user_id,
                type=type,
                severity=described.severity,
                title=described.title if type == event.type else title_of_mention(event, data),
                body=described.body,
                object=(event.object_type, event.object_id),
                href=described.href,
                event_id=event.id,
                group=groups.get(user_id) or f"{type} {event.object_type} {event.object_id}",
                cause=cause,
            )
            for user_id, type in told.items()
        ]

    def _may_be_notified(
        self, event: LoggedEvent, data: Mapping[str, Any], user_ids: Iterable[str], type: str
    ) -> list[Person]:
        """Return the users who may receive a notification of this type about an event."""
        found = [self._persons[each] for each in sorted(self._persons.keys() & set(user_ids))]
        return [person for person in found if self._people.may_be_notified(person, event, data, type)]

    def _named_recipients(self, event: LoggedEvent, rule: Rule) -> set[str]:
        wanted = rule.recipients
        named = {*wanted["users"], *(each for role in wanted["roles"] for each in self._roles.get(role, ()))}
        return named | ({event.owner_id} if wanted["owner"] and event.owner_id is not None else set())


def recipient_roles(
    events: Sequence[LoggedEvent], matched: Mapping[str, Sequence[Rule]], defaults: Collection[str]
) -> list[str]:
    """Return the roles whose members might have to be notified of the events."""
    wanted = {role for rules in matched.values() for rule in rules for role in rule.recipients["roles"]}
    audiences = {DEFAULTS[event.type] for event in events if event.type in defaults}
    wanted |= {"admin"} if audiences & {"admins", "approvers"} else set()
    return sorted(wanted | ({"member"} if "approvers" in audiences else set()))
