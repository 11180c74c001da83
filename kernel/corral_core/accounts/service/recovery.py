"""Account recovery: users reset a forgotten password, and admins help users who cannot sign in."""

from __future__ import annotations

from collections.abc import Iterable

from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.http.answers import ANY_VERSION, IfMatch
from corral.jobs.job import enqueue
from corral_core.accounts.api import Mail, UserView
from corral_core.accounts.models import UserRow
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.links import PASSWORD_LINKS, RESET, SET_PASSWORD, SingleUseLinks
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.second_factor import SecondFactor
from corral_core.accounts.service.sessions import Device
from corral_core.accounts.service.sign_in import PendingSignIn, SignedIn, SignIn

FORGOT = "accounts.forgot_password"


class PasswordRecovery:
    """Lets users reset a forgotten password through an emailed link."""

    def __init__(
        self,
        work: Work,
        accounts: AccountsService,
        sign_in: SignIn,
        lockout: Lockout,
        links: SingleUseLinks,
        mail: MailService,
    ) -> None:
        self._work, self._accounts, self._sign_in = work, accounts, sign_in
        self._lockout, self._links, self._mail = lockout, links, mail

    async def send_reset_link(self, email: str, entry: UnitContext) -> None:
        """Enqueue a job that emails a reset link. The same code runs for every address, so timing reveals nothing."""
        if self._mail.is_configured:
            await self._work(lambda: enqueue(FORGOT, email=email), entry=entry)

    async def reset_password(
        self, token: str, password: str, device: Device, entry: UnitContext
    ) -> SignedIn | PendingSignIn:
        """Set a new password with the token from a link, and sign in.

        All other links and sessions of the user become invalid, and any lockout ends. A second factor is still
        required.
        """
        hashed = await self._hash_password(token, password)
        return await self._work(lambda: self._sign_in.create_session(self._redeem(token, hashed), device), entry=entry)

    async def set_password(self, token: str, password: str, entry: UnitContext) -> None:
        """Set a new password with the token from a link, like `reset_password`, but do not sign in."""
        hashed = await self._hash_password(token, password)
        await self._work(lambda: self._redeem(token, hashed), entry=entry)

    async def _hash_password(self, token: str, password: str) -> str:
        row = await self._work(lambda: self._user_of_link(token), read=True)
        return await self._accounts.hash_password(
            password, email=row.email, full_name=row.full_name, pointer="/new_password", user_id=row.id
        )

    def _redeem(self, token: str, hashed: str) -> UserRow:
        link = self._links.redeem_link(PASSWORD_LINKS, token)
        row = self._accounts.get_row(link.subject_id, hold=True)
        if not row.is_active:
            raise self._links.link_expired_error()
        self._accounts.set_password_by_link(row, hashed, proves=link.email)
        self._lockout.unlock(row.email, row.id)
        return self._accounts.get_row(row.id)

    def _user_of_link(self, token: str) -> UserRow:
        return self._accounts.get_row(self._links.find_link(PASSWORD_LINKS, token).subject_id)


class PasswordLinksService:
    """Issues and emails links that let users set a password. Implements `corral_core.accounts.api.PasswordLinks`."""

    def __init__(self, accounts: AccountsService, links: SingleUseLinks, mail: MailService) -> None:
        self._accounts, self._links, self._mail = accounts, links, mail

    def send_welcome_link(self, user_id: str) -> str | None:
        row = self._accounts.get_row(user_id)
        mailed = self._mail.send_link(row.email, SET_PASSWORD, row.id)
        return None if mailed else self._links.issue_url(SET_PASSWORD, row.id)

    def create_reset_link(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> str:
        """Delete the password of a user and end all their sessions. Return the URL of a reset link."""
        row = self._accounts.drop_password(user_id, if_match=if_match)
        url = self._links.issue_url(RESET, row.id)
        self._mail.send_link(row.email, RESET, row.id)
        return url


class AccountRecoveryService:
    """Lets admins unlock accounts and remove second factors. Implements `corral_core.accounts.api.AccountRecovery`."""

    mail: Mail | None = None

    def __init__(self, accounts: AccountsService, lockout: Lockout, second: SecondFactor) -> None:
        self._accounts, self._lockout, self._second = accounts, lockout, second

    def unlock(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        user = self._accounts.get_row(user_id, hold=True)
        if_match.check(user.version)
        self._lockout.unlock(user.email, user.id)
        return self._accounts.get(user_id)

    def reset_mfa(self, user_id: str, *, if_match: IfMatch = ANY_VERSION) -> UserView:
        user = self._accounts.get_row(user_id, hold=True)
        if_match.check(user.version)
        if self._second.disable(user.id):
            self._accounts.end_sessions(user.id, "revoked")
            if self.mail is not None:
                self.mail.notify(user.email, "mfa_reset")
        return self._accounts.get(user_id)

    def failed_attempts(self, emails: Iterable[str]) -> dict[str, int]:
        return self._lockout.count_failures(emails)
