"""Finds the people to notify about events, and reads their current permissions. Every method runs in a unit of work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, cast

import msgspec
from msgspec import UNSET

from corral.auth.principal import SYSTEM_PRINCIPAL, Principal
from corral.auth.visibility import EventRights
from corral.events.log import LoggedEvent
from corral_core.accounts.api import Accounts, Role, UserQuery
from corral_plugins.approvals.api import Approvals
from corral_plugins.code_reviews.api import CodeReviews
from corral_plugins.notifications.models import Channel, Preference
from corral_plugins.notifications.service.event_catalogue import DEFAULTS, is_at_least, severity_of

MAX_PEOPLE = 10_000
FAILURE = "error"


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """A person who may be notified, with their permissions, address and preferences."""

    principal: Principal
    email: str
    mute: frozenset[str]
    email_preference: str
    quiet_hours: Mapping[str, Any] | None

    @property
    def id(self) -> str:
        """The id of the user."""
        return self.principal.id


class People:
    """Finds the people to notify about the events in one batch."""

    approvals: Approvals | None
    code_reviews: CodeReviews | None

    def __init__(self, accounts: Accounts, rights: EventRights) -> None:
        self._accounts, self._rights = accounts, rights

    def with_role(self, role: str, cursor: str = "") -> tuple[list[str], str | None]:
        """Return a page of ids of active users with a role, and the cursor of the next page.

        The cursor is None on the last page.
        """
        page = self._accounts.list(
            UserQuery(role=[cast(Role, role)], is_active=True, limit=200, cursor=cursor or UNSET), SYSTEM_PRINCIPAL
        )
        return [user.id for user in page.items], page.next

    def load(self, user_ids: Collection[str]) -> dict[str, Person]:
        """Return the active users among the given users, keyed by id."""
        principals = self._accounts.principals_of(user_ids)
        users = {key: user for key, user in self._accounts.get_many(principals).items() if key in principals}
        wishes = {row.user_id: row for row in Preference.select().where(Preference.user_id.in_(list(users)))}
        return {
            key: Person(
                principal=principals[key],
                email=user.email,
                mute=frozenset(wishes[key].mute) if key in wishes else frozenset(),
                email_preference=wishes[key].email if key in wishes else "all",
                quiet_hours=wishes[key].quiet_hours if key in wishes else None,
            )
            for key, user in users.items()
        }

    def default_recipients(
        self, event: LoggedEvent, data: Mapping[str, Any], roles: Mapping[str, Sequence[str]]
    ) -> set[str]:
        """Return the ids of the people who are notified of an event without any rule.

        `roles` maps roles to user ids.
        """
        match DEFAULTS[event.type]:
            case "owner":
                found = {event.owner_id}
            case "admins":
                found = set(roles["admin"])
            case "recipient":
                found = {data.get("recipient_user_id")}
            case "requester":
                people = self.approvals.involved(event.object_id) if self.approvals is not None else None
                found = {people.requester_id if people is not None else event.owner_id}
            case "approvers":
                found = self._approvers(event.object_id, roles)
            case "reviewers" | "author" as part:
                found = self._people_of_review(event.object_id, part)
        return {each for each in found if each is not None}

    def may_be_notified(self, person: Person, event: LoggedEvent, data: Mapping[str, Any], type: str) -> bool:
        """Return whether a person may read an event and wants notifications of this type.

        People are notified of their own actions only if the actions failed.
        """
        if type in person.mute or not self._rights.can_read(person.principal, event):
            return False
        is_own = event.actor_type == "user" and event.actor_id == person.id
        return not is_own or is_at_least(severity_of(event, data), FAILURE)

    def still_wants(self, person: Person, events: Collection[str], logged: Iterable[LoggedEvent]) -> bool:
        """Return whether a person still wants an email about these types of events, and may read all logged events."""
        if person.email_preference == "off" or person.mute.issuperset(events):
            return False
        return all(self._rights.can_read(person.principal, event) for event in logged)

    def _people_of_review(self, review_id: str, part: str) -> set[str | None]:
        people = self.code_reviews.involved(review_id) if self.code_reviews is not None else None
        if people is None:
            return set()
        asked = {*people.reviewer_ids, people.task_owner_id} - {None}
        return asked if asked and part == "reviewers" else {people.agent_owner_id}

    def _approvers(self, approval_id: str, roles: Mapping[str, Sequence[str]]) -> set[str | None]:
        people = self.approvals.involved(approval_id) if self.approvals is not None else None
        if people is None:
            return set()
        found: set[str | None] = set(roles["admin"])
        for each in people.approvers:
            found |= {*each.users, *(user for role in each.roles for user in roles.get(role, ()))}
        return found - people.excluded


def individual_recipients(channel: Channel, people: Iterable[Person], severity: str) -> Sequence[Person | None]:
    """Return the people whom a channel notifies individually, or `(None,)` if the channel has a fixed destination."""
    if not channel.config.get("to_recipients"):
        return (None,)
    wanted = {"all": True, "important": is_at_least(severity, FAILURE), "off": False}
    return [person for person in people if wanted[person.email_preference]]
