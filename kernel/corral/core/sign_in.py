"""Signing in, step by step: look up, hash, open a session. Hashing lies between two units, never inside one."""

from __future__ import annotations

from corral.auth.addresses import normalise
from corral.auth.models import UserRow
from corral.auth.passwords import Passwords
from corral.core.accounts import AccountsService
from corral.core.api import NewUser, UserView
from corral.core.declarations import DEFAULT_ROLE, REGISTRATION
from corral.core.sessions import Device, Reuse, Sessions, Tokens
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Forbidden, Unauthorized
from corral.plugin import Audit, AuditEntry, Settings


class SignIn:
    """What the routes of `/auth` call. `entry` is the door by which the request came: it is written into events."""

    audit: Audit | None = None

    def __init__(
        self, work: Work, passwords: Passwords, accounts: AccountsService, sessions: Sessions, settings: Settings
    ) -> None:
        self._work, self._passwords, self._settings = work, passwords, settings
        self._accounts, self._sessions = accounts, sessions

    async def check(self, email: str, password: str, entry: Entry, *, pointer: str = "/password") -> UserRow:
        """The active account that this password opens; every verification of a password passes here.

        Wrong address, wrong password, deactivated account: they take the same time and give `invalid_credentials`.
        """
        row = await self._work(lambda: self._accounts.row_of(email), read=True)
        known = row.password_hash if row is not None and row.is_active else None
        if await self._passwords.verify(password, known, pointer=pointer):
            assert row is not None
            return row
        await self._refused(email, None if row is None else row.id, entry)
        raise Unauthorized("The address or the password is wrong.", code="invalid_credentials")

    async def login(self, email: str, password: str, device: Device, entry: Entry) -> tuple[Tokens, UserView]:
        """Sign in with a password."""
        checked = await self.check(email, password, entry)
        assert checked.password_hash is not None
        fresh = await self._passwords.hash(password) if self._passwords.needs_rehash(checked.password_hash) else None

        def unit() -> tuple[Tokens, UserView]:
            row = self._accounts.row(checked.id)
            if not row.is_active or row.password_hash != checked.password_hash:  # changed while it was verified
                raise Unauthorized("The address or the password is wrong.", code="invalid_credentials")
            if fresh is not None:
                self._accounts.rehash(row, fresh)
            tokens = self._sessions.open(row, device)
            return tokens, self._accounts.get(row.id)

        return await self._work(unit, entry=entry)

    async def register(self, email: str, password: str, full_name: str, entry: Entry) -> UserView:
        """Make an account by oneself, where the settings allow it."""
        if self._settings.get(REGISTRATION) != "open":
            raise Forbidden("Registration is closed here; ask an admin for an account.", code="registration_closed")
        role = self._settings.get(DEFAULT_ROLE)
        new = NewUser(email=email, full_name=full_name, role="viewer" if role == "viewer" else "member")
        password_hash = await self._accounts.hash_password(password, email=email, full_name=full_name)
        return await self._work(lambda: self._accounts.register(new, password_hash), entry=entry)

    async def refresh(self, token: str, device: Device, entry: Entry) -> tuple[Tokens, UserView]:
        """Exchange a refresh token; `token_reuse` ends the session for good before it is told."""

        def unit() -> tuple[Tokens, UserView] | Reuse:
            tokens = self._sessions.rotate(token, device)
            return tokens if isinstance(tokens, Reuse) else (tokens, self._accounts.get(tokens.user_id))

        rotated = await self._work(unit, entry=entry)
        if isinstance(rotated, Reuse):
            raise Unauthorized("The refresh token was used before; sign in again.", code="token_reuse")
        return rotated

    async def change_password(
        self, user_id: str, session_id: str, current: str, new: str, *, revoke_api_keys: bool, entry: Entry
    ) -> tuple[Tokens, UserView]:
        """Change the own password: all other sessions end, this one goes on with new tokens."""
        user = await self._work(lambda: self._accounts.get(user_id), read=True)
        row = await self.check(user.email, current, entry, pointer="/current_password")
        password_hash = await self._accounts.hash_password(
            new, email=row.email, full_name=row.full_name, pointer="/new_password"
        )

        def unit() -> tuple[Tokens, UserView]:
            self._accounts.replace_password(row, password_hash, must_change=False, revoke_api_keys=revoke_api_keys)
            self._sessions.end_all(user_id, "password_changed", keep=session_id)
            return self._sessions.restart(session_id), self._accounts.get(user_id)

        return await self._work(unit, entry=entry)

    async def _refused(self, email: str, user_id: str | None, entry: Entry) -> None:
        audit = self.audit
        if audit is not None:
            failure = AuditEntry(
                action="auth.session.create", object_type="user", object_id=user_id, outcome="failed",
                code="invalid_credentials",
                details={"email": normalise(email)[:254]},
            )  # fmt: skip
            await self._work(lambda: audit.record(failure), entry=entry)
