"""How changes of accounts are written into the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.database.unit import current
from corral.plugin import SECRET_CHANGE
from corral_core.accounts.models import UserRow

RIGHTS = frozenset({"role", "is_active", "must_change_password", "email_verified"})


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
