"""The one visibility query: lists, counts, reads by id, `/ws`, SSE and the event log all ask here."""

from __future__ import annotations

from typing import Any, Protocol

import peewee

from corral.auth.principal import Principal
from corral.database.model import ADMIN, PRIVATE, SHARED, Model
from corral.events.log import Record

ALL = peewee.SQL("1 = 1")
NONE = peewee.SQL("1 = 0")


def can_read(caller: Principal, visibility: str, owner_id: str | None) -> bool:
    """Whether the caller may read an object of this class and owner now.

    *private*: its owner. *shared*: everyone but auditors; agents act with their person's rights. *admin*: admins.
    *private and admin* (accounts): the person and admins.
    """
    if caller.kind == "system":
        return True
    if visibility == SHARED:
        return caller.role != "auditor"
    if visibility == PRIVATE:
        return owner_id is not None and caller.user_id == owner_id
    if visibility == ADMIN:
        return caller.is_admin
    return caller.is_admin or (owner_id is not None and caller.user_id == owner_id)


class EventRights(Protocol):
    """The same of events, of which one tells of objects of the area that has emitted it."""

    def can_read(self, caller: Principal, record: Record) -> bool:
        """Whether the caller may read this event now."""
        ...


def visible(model: type[Model], caller: Principal) -> Any:
    """The `where` that leaves what the caller may read of a table; put it into every query that answers a caller."""
    if caller.kind == "system":
        return ALL
    if model.visibility == SHARED:
        return NONE if caller.role == "auditor" else ALL
    if model.visibility == PRIVATE:
        if model.owner_field is None or caller.user_id is None:
            return NONE
        return getattr(model, model.owner_field) == caller.user_id
    return ALL if caller.is_admin else NONE
