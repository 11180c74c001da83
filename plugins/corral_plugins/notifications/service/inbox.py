"""Writes and lists in-app notifications. Every method runs in the caller's unit of work."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import msgspec
import peewee
from msgspec import UNSET

from corral import clock
from corral.auth.principal import Principal
from corral.auth.visibility import visible
from corral.database.model import PRIVATE
from corral.events.event import emit
from corral.http.page import Page, newest_first, paginate
from corral.ids import new_id
from corral_plugins.notifications.api import NotificationArrived, NotificationView, Severity
from corral_plugins.notifications.models import Notification
from corral_plugins.notifications.service.rows import find_notification, notification_view
from corral_plugins.notifications.shapes import MarkAllRead, MarkedRead, NotificationQuery, UnreadCount

COUNTING_SECONDS = 300.0  # for which further events of a group count up a notification
MAX_A_USER, AT_ONCE, SHOWN_TITLES = 10_000, 500, 10
UNREAD = Notification.read_at.is_null()
REQUESTS = ("approval.created", "approval.updated", "code_review.created", "code_review.updated")
"""The events that ask people for a decision or remind them of it."""
Position = tuple[str, str]
"""A position in the list of all notifications: the time and the id of a notification."""


class NewNotification(msgspec.Struct, frozen=True, kw_only=True):
    """A notification for one person about one event."""

    user_id: str
    type: str
    severity: Severity
    title: str
    body: str
    object: tuple[str, str] | None
    href: str | None
    event_id: str | None
    group: str
    cause: tuple[str, ...] = ()  # the chain of causes of the event


class Inbox:
    """The in-app notifications of all users."""

    def add(self, new: Iterable[NewNotification]) -> None:
        """Write notifications, or add their events to an unread notification of the same person and group.

        Events can be added to a notification during the first 5 minutes after its creation.
        """
        groups: dict[tuple[str, str], list[NewNotification]] = {}
        for each in new:
            groups.setdefault((each.user_id, _hash(each.group)), []).append(each)
        if not groups:
            return
        rows = _unread_rows(groups)
        unread = Counter(_count_unread({user_id for user_id, _ in groups}))
        added: list[Notification] = []
        for (user_id, key), items in groups.items():
            row = rows.get((user_id, key))
            if row is None or not _add_events(row, items):
                row = _new_row(key, items)
                added.append(row)
                unread[user_id] += 1
            arrived = NotificationArrived(notification=notification_view(row), unread=unread[user_id])
            cause = items[-1].cause or None
            emit(arrived, object=("notification", row.id), owner=user_id, visibility=PRIVATE, cause=cause)
        Notification.bulk_create(added, batch_size=AT_ONCE)

    def list(self, query: NotificationQuery, *, by: Principal) -> Page[NotificationView]:
        """Return a page of the caller's notifications, newest first."""
        where: Any = visible(Notification, by)
        if query.unread is not UNSET:
            where &= UNREAD if query.unread else Notification.read_at.is_null(False)
        if query.severity is not UNSET:
            where &= Notification.severity.in_(query.severity)
        if query.type is not UNSET:
            where &= Notification.type.in_(query.type)
        rows = Notification.select().where(where)
        order = newest_first(Notification)
        return paginate(rows, query, by, scope="notifications", order=order, make=notification_view)

    def get(self, notification_id: str, *, by: Principal) -> NotificationView:
        """Return one of the caller's notifications."""
        return notification_view(find_notification(notification_id, by))

    def count_unread(self, *, by: Principal) -> UnreadCount:
        """Return the number of the caller's unread notifications."""
        number = peewee.fn.COUNT(Notification.id)
        mine = visible(Notification, by) & UNREAD
        rows: Any = Notification.select(Notification.severity, number).where(mine).group_by(Notification.severity)
        found = {str(severity): int(count) for severity, count in rows.tuples()}
        return UnreadCount(unread=sum(found.values()), by_severity=found)

    def mark(self, notification_id: str, is_read: bool, *, by: Principal) -> NotificationView:
        """Mark one of the caller's notifications as read or unread."""
        row = find_notification(notification_id, by)
        changed = UNREAD if is_read else Notification.read_at.is_null(False)
        at = clock.now() if is_read else None
        if Notification.update(read_at=at).where((Notification.id == row.id) & changed).execute():
            row.read_at = at
        return notification_view(row)

    def mark_all(self, body: MarkAllRead, *, by: Principal) -> MarkedRead:
        """Mark as read the caller's notifications whose latest event happened before `body.before`.

        The default for `body.before` is the current time.
        """
        before = clock.now() if body.before is UNSET else clock.from_datetime(body.before)
        mine = visible(Notification, by) & UNREAD & (Notification.last_at < before)
        return MarkedRead(updated=int(Notification.update(read_at=clock.now()).where(mine).execute()))

    def delete(self, notification_id: str, *, by: Principal) -> None:
        """Delete one of the caller's notifications."""
        row = find_notification(notification_id, by)
        Notification.delete().where(Notification.id == row.id).execute()


def mark_requests_read(user_id: str, object_type: str, object_id: str) -> None:
    """Mark as read the notifications that asked a person for a decision on an object."""
    about = (Notification.object_type == object_type) & (Notification.object_id == object_id)
    mine = (Notification.user_id == user_id) & UNREAD & Notification.type.in_(REQUESTS)
    Notification.update(read_at=clock.now()).where(mine & about).execute()


def delete_old(read_before: str, unread_before: str, after: Position) -> Position | None:
    """Delete a batch of old notifications after the position `after`.

    Return the position of the last examined notification, or None if there are no more.

    One call examines only one batch, because most of the examined notifications may be unread, and unread notifications
    are kept longer.
    """
    columns = (Notification.created_at, Notification.id, Notification.read_at)
    follows = (Notification.created_at >= after[0]) & (peewee.Tuple(*columns[:2]) > peewee.Tuple(*after))
    may_be_old = Notification.created_at < max(read_before, unread_before)
    some = Notification.select(*columns).where(follows & may_be_old).order_by(*columns[:2]).limit(AT_ONCE)
    rows: list[Any] = list(some.tuples())
    old = [row[1] for row in rows if row[0] < (unread_before if row[2] is None else read_before)]
    if old:
        is_old = (Notification.created_at < unread_before) | Notification.read_at.is_null(False)
        Notification.delete().where(Notification.id.in_(old) & is_old).execute()
    return (rows[-1][0], rows[-1][1]) if len(rows) == AT_ONCE else None


def delete_of_user(user_id: str) -> int:
    """Delete a batch of a person's notifications. Return the number of deleted notifications."""
    some = Notification.select(Notification.id).where(Notification.user_id == user_id).limit(AT_ONCE)
    return int(Notification.delete().where(Notification.id.in_(some)).execute())


def users_with_surplus() -> list[tuple[str, int]]:
    """Return the users with more than 10,000 notifications, each with the number of notifications above this limit."""
    number = peewee.fn.COUNT(Notification.id)
    rows: Any = Notification.select(Notification.user_id, number).group_by(Notification.user_id)
    return [(user_id, count - MAX_A_USER) for user_id, count in rows.having(number > MAX_A_USER).tuples()]


def delete_surplus(user_id: str, surplus: int) -> int:
    """Delete a batch of a person's surplus notifications. Return the number of deleted notifications.

    Read notifications are deleted first, and older ones before newer ones.
    """
    order = (Notification.read_at.is_null(), Notification.created_at)
    mine = Notification.select(Notification.id).where(Notification.user_id == user_id).order_by(*order)
    return int(Notification.delete().where(Notification.id.in_(mine.limit(min(surplus, AT_ONCE)))).execute())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _unread_rows(groups: Collection[tuple[str, str]]) -> dict[tuple[str, str], Notification]:
    """Return, for each person and group, the newest unread notification to which events can still be added."""
    people, keys = {user_id for user_id, _ in groups}, {key for _, key in groups}
    is_recent = UNREAD & (Notification.created_at > clock.now(-COUNTING_SECONDS))
    mine = Notification.user_id.in_(people) & Notification.group_key.in_(keys)
    rows = Notification.select().where(mine & is_recent).order_by(Notification.created_at, Notification.id)
    return {(row.user_id, row.group_key): row for row in rows}


def _count_unread(people: Collection[str]) -> dict[str, int]:
    number = peewee.fn.COUNT(Notification.id)
    rows: Any = Notification.select(Notification.user_id, number).where(Notification.user_id.in_(people) & UNREAD)
    return dict(rows.group_by(Notification.user_id).tuples())


def _add_events(row: Notification, items: list[NewNotification]) -> bool:
    """Add events to a notification. Return False if the notification has been read in the meantime."""
    changes = {
        **_newest_event_columns(items[-1]),
        "titles": _titles(row.titles or [row.title], items),
        "last_at": clock.now(),
    }
    counted = {**changes, "count": Notification.count + len(items)}
    if not Notification.update(counted).where((Notification.id == row.id) & UNREAD).execute():
        return False
    for name, value in changes.items():
        setattr(row, name, value)
    row.count += len(items)
    return True


def _new_row(key: str, items: list[NewNotification]) -> Notification:
    now, last = clock.now(), items[-1]
    about: Mapping[str, Any] = {}
    if last.object is not None:
        about = {"object_type": last.object[0], "object_id": last.object[1]}
    fields = {"id": new_id(), "user_id": last.user_id, "type": last.type, "group_key": key, "count": len(items)}
    newest = {**_newest_event_columns(last), "titles": _titles([], items)}
    return Notification(**fields, **about, **newest, href=last.href, created_at=now, last_at=now)


def _titles(known: list[str], items: Iterable[NewNotification]) -> list[str]:
    """Return the first distinct titles among the stored titles and the titles of further events."""
    return list(dict.fromkeys([*known, *(item.title for item in items)]))[:SHOWN_TITLES]


def _newest_event_columns(item: NewNotification) -> dict[str, Any]:
    return {name: getattr(item, name) for name in ("severity", "title", "body", "event_id")}
