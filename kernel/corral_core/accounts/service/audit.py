"""Helpers that describe changes of accounts in the audit log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from corral.database.unit import current
from corral.plugin import SECRET_CHANGE
from corral_core.accounts.models import UserRow

RIGHTS = frozenset({"role", "is_active", "must_change_password", "email_verified"})


def shown(row: UserRow, changes: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Return the old and the new value of a column for the audit log.

    Personal data is replaced by `SECRET_CHANGE`, so that the audit log contains only ids after an account is purged.
    """
    return (getattr(row, name), changes[name]) if name in RIGHTS else SECRET_CHANGE


def is_own(user_id: str) -> bool:
    """Return whether the actor of the current unit of work is the account's own user, signed in or anonymous."""
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def action(verb: str, user_id: str) -> str:
    """Return the audit action of a change: `auth.user.<verb>` by the account's own user, else `admin.user.<verb>`."""
    return f"{'auth' if is_own(user_id) else 'admin'}.user.{verb}"
