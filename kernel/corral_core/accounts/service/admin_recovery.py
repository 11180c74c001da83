"""What admins do for people who cannot get into their account any more."""

from __future__ import annotations

from collections.abc import Iterable

from corral_core.accounts.api import Mail, UserView
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.second_factor import SecondFactor


class RescueService:
    """Implements `corral_core.accounts.api.Rescue`."""

    mail: Mail | None = None

    def __init__(self, accounts: AccountsService, lockout: Lockout, second: SecondFactor) -> None:
        self._accounts, self._lockout, self._second = accounts, lockout, second

    def unlock(self, user_id: str) -> UserView:
        user = self._accounts.row(user_id)
        self._lockout.unlock(user.email, user.id)
        return self._accounts.get(user_id)

    def reset_mfa(self, user_id: str) -> UserView:
        user = self._accounts.row(user_id)
        if self._second.disable(user.id):
            self._accounts.end_sessions(user.id, "revoked")
            if self.mail is not None:
                self.mail.notify(user.email, "mfa_reset")
        return self._accounts.get(user_id)

    def failed_attempts(self, emails: Iterable[str]) -> dict[str, int]:
        return self._lockout.failures(emails)
