"""Sends notifications for workflows and triggers, without a rule. Every method runs in the caller's unit of work."""

from __future__ import annotations

from typing import Any

from corral import clock
from corral.auth.principal import Principal
from corral.database.unit import after_commit
from corral.errors import Forbidden, Invalid
from corral.ids import new_id
from corral.redact.redactor import Redactor
from corral_core.accounts.api import Accounts
from corral_plugins.notifications.api import SEVERITIES, Json
from corral_plugins.notifications.models import Channel, Delivery
from corral_plugins.notifications.service.dispatcher import NotificationDispatcher
from corral_plugins.notifications.service.event_catalogue import MAX_BODY, MAX_TITLE, href_of
from corral_plugins.notifications.service.inbox import Inbox, NewNotification
from corral_plugins.notifications.service.plain_text import one_line, without_control_characters
from corral_plugins.notifications.service.recipients import People, individual_recipients

ID: Json = {"type": "string", "format": "uuid"}
SENT_EVENT = "notification.sent"
SEND, MANAGE = "notifications.read", "notifications.manage"
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "title": {
            "type": "string",
            "minLength": 1,
            "maxLength": 1000,
            "description": "The title of the notification, of which the first 200 characters are shown.",
        },
        "body": {
            "type": "string",
            "maxLength": 65_536,
            "description": "The text of the notification, of which the first 2000 characters are shown.",
        },
        "severity": {"enum": list(SEVERITIES)},
        "channel_ids": {"type": "array", "items": ID, "maxItems": 10},
        "user_ids": {"type": "array", "items": ID, "maxItems": 50},
    },
    "required": ["title"],
    "additionalProperties": False,
}


class DirectNotifications:
    """Sends notifications whose text and recipients are chosen by the sender."""

    def __init__(
        self, accounts: Accounts, people: People, inbox: Inbox, redactor: Redactor, dispatcher: NotificationDispatcher
    ) -> None:
        self._accounts, self._people, self._inbox, self._redactor = accounts, people, inbox, redactor
        self._dispatcher = dispatcher

    def check(self, fields: Json, *, by: Principal, pointer: str = "") -> None:
        """Raise a `Problem` for people or channels that do not exist or that the caller may not use."""
        users, channels = _lowercase_ids(fields.get("user_ids")), _lowercase_ids(fields.get("channel_ids"))
        if channels and not by.may(MANAGE):
            raise Forbidden(f"Sending notifications through channels needs the permission {MANAGE}.")
        active = {key for key, user in self._accounts.get_many(users).items() if user.is_active} if users else set()
        known = {row.id for row in Channel.select(Channel.id).where(Channel.id.in_(channels))} if channels else set()
        _require_known(users, active, f"{pointer}/user_ids", "There is no active user with this id.")
        _require_known(channels, known, f"{pointer}/channel_ids", "There is no channel with this id.")

    def send(self, fields: Json, *, by: Principal, object: tuple[str, str], pointer: str = "") -> str:
        """Send a notification to the named people and channels, or to the caller if none are named.

        Return the id shared by all messages of the notification.
        """
        fields = self._redactor.redact_json(fields)
        self.check(fields, by=by, pointer=pointer)
        users, channels = _lowercase_ids(fields.get("user_ids")), _lowercase_ids(fields.get("channel_ids"))
        recipients = users or ([by.user_id] if by.user_id is not None else [])
        users = users if channels else recipients
        notification_id, severity = new_id(), fields.get("severity", "info")
        title, body = one_line(fields["title"], MAX_TITLE), without_control_characters(fields.get("body", ""), MAX_BODY)
        href = href_of(*object)
        self._inbox.add(
            NewNotification(
                user_id=each,
                type=SENT_EVENT,
                severity=severity,
                title=title,
                body=body,
                object=object,
                href=href,
                event_id=None,
                group=notification_id,
            )
            for each in users
        )
        item = {"event_id": None, "event": SENT_EVENT, "title": title, "body": body, "href": href, "at": clock.now()}
        self._write_deliveries(channels, recipients, notification_id, severity, item)
        return notification_id

    def _write_deliveries(
        self, channel_ids: list[str], recipients: list[str], key: str, severity: str, item: dict[str, Any]
    ) -> None:
        """Write one delivery per channel, or one per recipient if the channel notifies recipients separately."""
        channels = list(Channel.select().where(Channel.id.in_(channel_ids)).order_by(Channel.id)) if channel_ids else []
        people = self._people.load(recipients).values() if channels else ()
        if channels:
            after_commit(self._dispatcher.wake)
        for channel in channels:
            for person in individual_recipients(channel, people, severity):
                _write_delivery(channel.id, None if person is None else person.id, key, severity, item)


def _write_delivery(channel_id: str, user_id: str | None, key: str, severity: str, item: dict[str, Any]) -> None:
    now = clock.now()
    Delivery.create(
        id=new_id(),
        channel_id=channel_id,
        user_id=user_id,
        group_key=key,
        severity=severity,
        items=[item],
        next_attempt_at=now,
        due_at=now,
        ready_at=now,
        created_at=now,
    )


def _lowercase_ids(ids: Any) -> list[str]:
    return list(dict.fromkeys(str(each).lower() for each in ids or ()))


def _require_known(ids: list[str], known: set[str], pointer: str, detail: str) -> None:
    for index, each in enumerate(ids):
        if each not in known:
            raise Invalid.at(f"{pointer}/{index}", "unknown_reference", detail, problem="unknown_reference")
