"""The audit actions of account changes, which differ for changes by the user and changes by an admin."""

from __future__ import annotations

from corral.database.unit import current


def is_own_change(user_id: str) -> bool:
    """Return whether the actor of the unit of work is the account's own user. An anonymous actor counts as the user."""
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def audit_action(verb: str, user_id: str) -> str:
    """Return the audit action: `auth.user.<verb>` for a change to the user's own account, else `admin.user.<verb>`."""
    return f"{'auth' if is_own_change(user_id) else 'admin'}.user.{verb}"
