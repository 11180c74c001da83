"""The visibility rules for objects. Lists, counts, lookups by id, `/ws`, SSE and the event log all use these rules."""

from __future__ import annotations

from typing import Any, Protocol

import peewee

from corral.auth.principal import Principal
from corral.database.model import ADMIN, PRIVATE, PRIVATE_AND_ADMIN, SHARED, Model
from corral.events.log import LoggedEvent

ALL_ROWS = peewee.SQL("1 = 1")
NO_ROWS = peewee.SQL("1 = 0")


def can_read(caller: Principal, visibility: str, owner_id: str | None) -> bool:
    """Return whether the caller may currently read an object with this visibility and owner.

    A *private* object is visible to its owner, a *shared* object to everyone except auditors, and an *admin* object to
    admins. An object that is *private and admin* (an account) is visible to its owner and to admins. An agent may read
    shared objects and its user's objects. It never has admin rights, even if its user is an admin.
    """
    if caller.kind == "system" or (visibility in (ADMIN, PRIVATE_AND_ADMIN) and caller.is_admin):
        return True
    if visibility == SHARED:
        return caller.role != "auditor"
    return visibility in (PRIVATE, PRIVATE_AND_ADMIN) and owner_id is not None and caller.user_id == owner_id


class EventRights(Protocol):
    """The visibility rule for events.

    Machines, and API keys with restricted scopes, may read an event only if they hold the `<area>.read` permission,
    where `<area>` is the area that the event declares.
    """

    def can_read(self, caller: Principal, record: LoggedEvent) -> bool:
        """Return whether the caller may currently read this event."""
        ...


def visible(model: type[Model], caller: Principal) -> Any:
    """Return the `where` condition that selects the rows the caller may read.

    Every query whose rows are returned to a caller must use this condition:
    `Book.select().where(visible(Book, caller))`. The rule is the same as in `can_read`.
    """
    if can_read(caller, model.visibility, None):
        return ALL_ROWS
    if model.owner_field is None or not can_read(caller, model.visibility, caller.user_id):
        return NO_ROWS
    return getattr(model, model.owner_field) == caller.user_id
