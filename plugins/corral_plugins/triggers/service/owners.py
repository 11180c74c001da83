"""The rights with which a trigger acts: those that its owner has at the moment."""

from __future__ import annotations

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral.errors import Forbidden, NotFound
from corral_core.accounts.api import Accounts


class OwnerLacksRights(Forbidden):
    """The owner of a trigger is deactivated, or no longer has the rights that its action needs."""


class TriggerOwners:
    """Returns the principals of owners. Every method runs in the caller's unit of work."""

    def __init__(self, accounts: Accounts, permissions: Permissions) -> None:
        self._accounts, self._permissions = accounts, permissions

    def principal(self, user_id: str | None) -> Principal:
        """Return the principal of an active user. Raise `OwnerLacksRights` if there is none."""
        try:
            user = self._accounts.get(user_id or "")
        except NotFound:
            raise OwnerLacksRights("The owner of this trigger no longer exists.") from None
        if not user.is_active:
            raise OwnerLacksRights("The owner of this trigger is deactivated.")
        return Principal(
            kind="user", id=user.id, user_id=user.id, role=user.role, permissions=self._permissions.held_by(user.role)
        )


def require_action_permission(caller: Principal, permission: str) -> None:
    """Raise `Forbidden` unless the caller may do what the action does, and may have triggers."""
    for needed in ("triggers.write", permission):
        if not caller.may(needed):
            raise Forbidden(f"The action of this trigger needs the permission {needed}.")
