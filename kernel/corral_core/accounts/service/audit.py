"""How changes of accounts are written into the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.database.unit import current
from corral.plugin import SECRET_CHANGE
from corral_core.accounts.models import UserRow

RIGHTS = frozenset({"role", "is_active", "must_change_password", "email_verified"})


def shown(row: UserRow, changes: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """A change as the audit log keeps it: personal data only as "changed", so that it survives a purge as ids alone."""
    return (getattr(row, name), changes[name]) if name in RIGHTS else SECRET_CHANGE


def is_own(user_id: str) -> bool:
    """Whether the account's own user acts, signed in or not; joins the unit."""
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def action(verb: str, user_id: str) -> str:
    """The audit action for a change of an account: area `auth` for its own user, `admin` for anybody else."""
    return f"{'auth' if is_own(user_id) else 'admin'}.user.{verb}"
