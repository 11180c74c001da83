"""The audit actions for account changes. They differ depending on whether the user or an admin makes the change."""

from __future__ import annotations

from corral.database.unit import current


def is_own_change(user_id: str) -> bool:
    """Return whether the actor of the current unit of work owns this account.

    An anonymous actor counts as the owner.
    """
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def audit_action(verb: str, user_id: str) -> str:
    """Return `auth.user.<verb>` for a change to the user's own account, or `admin.user.<verb>` for any other change."""
    return f"{'auth' if is_own_change(user_id) else 'admin'}.user.{verb}"
