"""Rows of accounts: how they are shown, and the guarded write that leaves no installation without an admin."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import peewee

from corral import clock
from corral.database.dialect import advisory_lock
from corral.database.unit import current
from corral.errors import Conflict
from corral.plugin import SECRET_CHANGE
from corral_core.accounts.api import UserView
from corral_core.accounts.models import UserRow

RIGHTS = frozenset({"role", "is_active", "must_change_password", "email_verified"})


def view(row: UserRow) -> UserView:
    """An account as it is shown."""
    fields = {name: getattr(row, name) for name in UserView.__struct_fields__}
    if row.locked_until is not None and row.locked_until <= clock.now():
        fields["locked_until"] = None
    return UserView(**fields)


def shown(row: UserRow, changes: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """A change as the audit log keeps it for ever: of the person only that it changed, so that a purge leaves ids."""
    return (getattr(row, name), changes[name]) if name in RIGHTS else SECRET_CHANGE


def is_own(user_id: str) -> bool:
    """Whether the holder of the account acts, who need not be signed in; joins the unit."""
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def action(verb: str, user_id: str) -> str:
    """For the audit log: what people do to their own account is of another area than what admins do to it."""
    return f"{'auth' if is_own(user_id) else 'admin'}.user.{verb}"


def write(row: UserRow, changes: Mapping[str, Any]) -> None:
    """Change the row that was read; `Conflict` when somebody else did, and `last_admin` when nobody would be left."""
    stays = changes.get("role", "admin") == "admin" and changes.get("is_active", True)
    loses_admin = row.role == "admin" and row.is_active and not stays
    where = (UserRow.id == row.id) & (UserRow.version == row.version)
    if loses_admin:
        _lock_admins()
        other = UserRow.alias()
        rest = other.select(peewee.fn.COUNT(other.id)).where(
            (other.role == "admin") & (other.is_active == True) & (other.id != row.id)  # noqa: E712  # SQL
        )
        where &= rest > 0
    update = UserRow.update(**changes, updated_at=clock.now(), version=UserRow.version + 1)
    with unique():
        if update.where(where).execute():
            return
    if loses_admin and UserRow.get_by_id(row.id).version == row.version:
        raise Conflict("This is the last active admin; make another one first.", code="last_admin")
    raise Conflict("The account was changed meanwhile; read it again.", current_status="changed")


def taken() -> Conflict:
    """Another account has the address."""
    return Conflict("Another account has this address.", code="duplicate")


@contextlib.contextmanager
def unique() -> Iterator[None]:
    """Two who take an address at once: the index decides, and the unit of the second is rolled back."""
    try:
        yield
    except peewee.IntegrityError:
        raise taken() from None


def _lock_admins() -> None:
    """Changes that take an admin away come one after the other."""
    advisory_lock("accounts.admins")
