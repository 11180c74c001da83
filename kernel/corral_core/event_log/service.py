"""The service of the event log, which decides which events a caller may read.

The decision depends on the visibility, the owner and the permission area of each event. For example, the permission
`tasks.read` allows reading the objects in the permission area `tasks`.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from corral.auth.credentials import KEEP_SECONDS
from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.auth.visibility import ALL_ROWS, NO_ROWS, can_read
from corral.database.model import ADMIN, PRIVATE, SHARED
from corral.events.event import EventType, EventTypes
from corral.events.log import EventRow, LoggedEvent

CACHE_LIMIT = 1000


class ReadableNames(NamedTuple):
    """The names of the events that a caller may read, in one set for each reason why the caller may read them.

    `shared` contains events that are visible to all users, `admin` contains events that the caller may read as an
    admin, and `own` contains events that the caller may read about objects that the caller owns.
    """

    shared: frozenset[str]
    admin: frozenset[str]
    own: frozenset[str]


class EventRightsService:
    """Decides which events a caller may read. Implements `corral.auth.visibility.EventRights`.

    For users, only the visibility and the owner of the event matter. A machine, or an API key with fewer permissions
    than its owner, must also have the read permission for the event's permission area. An API key may read events about
    its owner's account regardless of its scopes, because it may also read the account through `/auth`.
    """

    def __init__(self, types: EventTypes, permissions: Permissions) -> None:
        self._types, self._permissions = types, permissions
        self._names: dict[Any, tuple[ReadableNames, float]] = {}

    def can_read(self, caller: Principal, record: LoggedEvent) -> bool:
        if not can_read(caller, record.visibility, record.owner_id):
            return False
        names = self._readable_names(caller)
        if names is None:
            return True
        if record.visibility == SHARED:
            return record.type in names.shared
        is_own = record.visibility != ADMIN and record.owner_id is not None and record.owner_id == caller.user_id
        if is_own and record.type in names.own:
            return True
        return record.visibility != PRIVATE and caller.is_admin and record.type in names.admin

    def where(self, caller: Principal) -> Any:
        """Return an SQL condition that selects the events that the caller may read."""
        if caller.kind == "system":
            return ALL_ROWS
        names = self._readable_names(caller)
        shared, admin, own = (
            (ALL_ROWS, ALL_ROWS, ALL_ROWS) if names is None else (EventRow.type.in_(sorted(each)) for each in names)
        )
        is_own = EventRow.owner_id == caller.user_id if caller.user_id is not None else NO_ROWS
        everybodys = NO_ROWS if caller.role == "auditor" else (EventRow.visibility == SHARED) & shared
        owned = EventRow.visibility.not_in((SHARED, ADMIN)) & is_own & own
        if not caller.is_admin:
            return everybodys | owned
        return everybodys | owned | (EventRow.visibility.not_in((SHARED, PRIVATE)) & admin)

    def _readable_names(self, caller: Principal) -> ReadableNames | None:
        """Return the names of the events that the caller may read, or None if the caller may read all events."""
        if caller.kind in ("user", "system") or (caller.kind == "api_key" and not caller.out_of_scope):
            return None
        key = (caller.kind, caller.permissions, caller.out_of_scope)
        kept, now = self._names.get(key), time.monotonic()
        if kept is not None and now - kept[1] <= KEEP_SECONDS:
            return kept[0]
        if len(self._names) >= CACHE_LIMIT:
            self._names.clear()
        names = self._names_without_restriction(caller)
        self._names[key] = (names, now)
        return names

    def _names_without_restriction(self, caller: Principal) -> ReadableNames:
        areas = {each.event: self._permission_of(each) for each in self._types.all()}
        held = {name for name, area in areas.items() if caller.may(area)}
        unguarded = {name for name, area in areas.items() if not self._permissions.is_known(area)}
        if caller.kind == "api_key":  # a private event of a privileged area concerns the owner's own account
            is_account = self._permissions.are_privileged
            own = {name for name, area in areas.items() if area not in caller.out_of_scope or is_account((area,))}
        else:
            own = held | {each.event for each in self._types.all() if each.visibility == PRIVATE} & unguarded
        return ReadableNames(frozenset(held | unguarded), frozenset(held), frozenset(own))

    @staticmethod
    def _permission_of(kind: EventType) -> str:
        return f"{kind.payload.area or kind.plugin}.read"
