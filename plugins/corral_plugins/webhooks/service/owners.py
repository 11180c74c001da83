"""The rights with which a webhook receives events: those that its owner has at the moment."""

from __future__ import annotations

from collections.abc import Iterable

from corral.auth.permissions import Permissions
from corral.auth.principal import Principal
from corral_core.accounts.api import Accounts


class WebhookOwners:
    """Returns the principals of owners. Every method runs in the caller's unit of work."""

    def __init__(self, accounts: Accounts, permissions: Permissions) -> None:
        self._accounts, self._permissions = accounts, permissions

    def principals(self, user_ids: Iterable[str]) -> dict[str, Principal]:
        """Return the principals of those of the users that are active."""
        found = self._accounts.get_many(set(user_ids))
        return {
            user.id: Principal(
                kind="user",
                id=user.id,
                user_id=user.id,
                role=user.role,
                permissions=self._permissions.held_by(user.role),
            )
            for user in found.values()
            if user.is_active
        }
