"""Registers accounts, with or without an invitation, and verifies email addresses."""

from __future__ import annotations

import logging

import msgspec

from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, Forbidden, Invalid
from corral.jobs.job import enqueue
from corral.plugin import Settings
from corral_core.accounts.api import REGISTRATION, NewUser, UserView
from corral_core.accounts.models import UserRow
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.email_addresses import normalize_address
from corral_core.accounts.service.first_account import FirstAccountSetup
from corral_core.accounts.service.invitations import InvitationsService
from corral_core.accounts.service.links import EMAIL_LINKS, RESET, VERIFY, SingleUseLinks
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.passwords import Passwords
from corral_core.accounts.settings import DEFAULT_ROLE, EMAIL_VERIFICATION

log = logging.getLogger("corral.accounts")

RESEND = "accounts.resend_verification"


class AccountRegistration:
    """Registers accounts and verifies email addresses. Passwords are never hashed inside a unit of work."""

    def __init__(
        self,
        work: Work,
        accounts: AccountsService,
        invitations: InvitationsService,
        links: SingleUseLinks,
        mail: MailService,
        settings: Settings,
        passwords: Passwords,
        first: FirstAccountSetup,
    ) -> None:
        self._work, self._accounts, self._invitations, self._first = work, accounts, invitations, first
        self._links, self._mail, self._settings, self._passwords = links, mail, settings, passwords

    async def create_bootstrap_admin(self, email: str, password: str) -> None:
        """Create the admin that environment variables define, if no admin exists.

        The password policy does not apply.
        """
        if await self._work(self._accounts.has_admin, read=True):
            return
        hashed = await self._passwords.hash_password(password)
        new = NewUser(email=email, full_name="Administrator", role="admin")
        try:
            await self._work(lambda: self._accounts.create_bootstrap_admin(new, hashed))
        except Conflict:
            log.warning(
                "CORRAL_BOOTSTRAP_ADMIN_EMAIL names an existing account that is not an admin; the "
                "account was not changed"
            )

    async def register(
        self, new: NewUser, password: str, entry: UnitContext, *, invitation: str | None, setup_token: str | None
    ) -> UserView | None:
        """Create an account and return it. If the address must be verified, send an email and return None.

        When verification is required, the result is None even if the address is already taken. Raise `Forbidden`
        (`registration_closed`) unless the settings, the set-up token or the invitation allows this registration.
        """
        if invitation is not None:
            return await self.accept_invitation(invitation, new.full_name, password, entry, email=new.email)
        await self._work(lambda: self._check_allowed(setup_token), read=True)
        hashed = await self._accounts.hash_password(password, email=new.email, full_name=new.full_name)
        return await self._work(lambda: self._create_account(new, hashed, setup_token), entry=entry)

    def _check_allowed(self, setup_token: str | None) -> None:
        if not self._first.exists():
            self._first.check_token(setup_token)
        else:
            self._refuse_unless_open(setup_token)

    def _refuse_unless_open(self, setup_token: str | None) -> None:
        if setup_token is not None:
            raise Forbidden(
                "The set-up token is valid only for the first account, which already exists; register without the "
                "token.",
                code="registration_closed",
            )
        if self._settings.get(REGISTRATION) != "open":
            raise Forbidden(
                "Registration needs an invitation; ask an admin for one.",
                code="registration_closed",
            )

    def _create_account(self, new: NewUser, hashed: str, setup_token: str | None) -> UserView | None:
        if self._first.claim():
            self._first.check_token(setup_token)
            return self._accounts.register(msgspec.structs.replace(new, role="admin"), hashed, verified=True)
        self._refuse_unless_open(setup_token)  # another registration may have been the first in the meantime
        role = self._settings.get(DEFAULT_ROLE)
        new = msgspec.structs.replace(new, role="viewer" if role == "viewer" else "member")
        if not self._settings.get(EMAIL_VERIFICATION):
            return self._accounts.register(new, hashed)
        try:
            made = self._accounts.register(new, hashed)
        except Conflict as conflict:
            if conflict.code != "duplicate":
                raise
            self._notify_owner(new.email)
            return None
        self._mail.send_link(made.email, VERIFY, made.id)
        return None

    def _notify_owner(self, email: str) -> None:
        """Email the owner of an existing account, because someone tried to register with the owner's address.

        If the address is verified, or the account is inactive, the email reports the attempt. Otherwise, it contains a
        link that verifies the address. If the account was also never used, somebody else may have chosen the password.
        In this case, the password is deleted, and the email contains a link for setting a new one.
        """
        row = self._accounts.find_row(email, hold=True)
        if row is None:
            return
        if not row.is_active or row.email_verified:
            self._mail.notify(row.email, "address_taken")
            return
        if row.password_hash is not None and row.last_login_at is None:
            row = self._accounts.drop_password(row.id)
        send_verification(row, self._mail)

    async def accept_invitation(
        self, token: str, full_name: str, password: str, entry: UnitContext, *, email: str | None = None
    ) -> UserView:
        """Create the account of an invited user. If `email` is given, the invitation must be for this address.

        The invitation determines the role, and its address counts as verified. Raise `Forbidden`
        (`registration_closed`) while registration is closed, `Gone` (`link_expired`) if the invitation is not pending,
        and `Invalid` if it is for another address or the password breaks a rule.
        """
        if self._settings.get(REGISTRATION) == "closed":
            raise Forbidden("Registration is closed; ask an admin for an account.", code="registration_closed")
        invitation = await self._work(lambda: self._invitations.find_pending(token), read=True)
        if email is not None and normalize_address(email) != invitation.email_key:
            raise Invalid.at("/email", "not_allowed", "The invitation is for another email address.")
        new = NewUser(email=email or invitation.email, full_name=full_name)
        new = msgspec.structs.replace(new, role=invitation.role)
        hashed = await self._accounts.hash_password(password, email=new.email, full_name=new.full_name)

        def unit() -> UserView:
            made = self._accounts.register(new, hashed, how="invitation", verified=True)
            self._invitations.accept(token, made.id)
            return made

        return await self._work(unit, entry=entry)

    def verify_address(self, token: str) -> UserView:
        """Verify an email address with the token from an emailed link. Runs in the caller's unit of work.

        Raise `Gone` (`link_expired`) for an invalid link, or `Conflict` (`duplicate`) if another account has the
        address.
        """
        link = self._links.redeem_link(EMAIL_LINKS, token)
        row = self._accounts.get_row(link.subject_id)
        email = link.email or ""
        if not row.is_active or (link.kind == VERIFY and normalize_address(email) != row.email_key):
            raise self._links.link_expired_error()
        return self._accounts.prove_email(row, email)

    async def resend_verification(self, email: str, entry: UnitContext) -> None:
        """Enqueue another verification email. The same code runs for every address, so timing reveals nothing."""
        if self._mail.is_configured:
            await self._work(lambda: enqueue(RESEND, email=email), entry=entry)


def send_verification(row: UserRow, mail: MailService) -> None:
    """Email a link that verifies the user's address or, if the account has no password, a link that sets a password."""
    mail.send_link(row.email, VERIFY if row.password_hash is not None else RESET, row.id)
