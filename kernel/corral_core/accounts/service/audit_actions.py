"""The audit actions for account changes. They differ depending on whether the user or an admin makes the change."""

from __future__ import annotations

from corral.database.unit import current


def is_own_change(user_id: str) -> bool:
    """Return whether the actor of the unit of work is the user of this account.

    An anonymous actor counts as the user.
    """
    actor = current().entry.actor
    return actor.type == "anonymous" or user_id in (actor.id, actor.on_behalf_of)


def audit_action(verb: str, user_id: str) -> str:
    """Return `auth.user.<verb>` for a change to the user's own account, or `admin.user.<verb>` for any other change."""
    return f"{'auth' if is_own_change(user_id) else 'admin'}.user.{verb}"
