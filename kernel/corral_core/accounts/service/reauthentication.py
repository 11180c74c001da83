"""Re-authentication before sensitive actions, and management of the user's own second factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Forbidden, Problem
from corral.plugin import Settings
from corral_core.accounts.api import UserView
from corral_core.accounts.models import SessionRow, UserRow
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.second_factor import SecondFactor, Seed
from corral_core.accounts.service.sessions import Sessions
from corral_core.accounts.service.sign_in import ASK_AGAIN, Proof, SignIn, told
from corral_core.accounts.settings import STEP_UP_SECONDS

T = TypeVar("T")


class Reauthentication:
    """Manages the second factor of the signed-in user, and re-authenticates the user (step-up)."""

    def __init__(
        self,
        work: Work,
        accounts: AccountsService,
        sessions: Sessions,
        sign_in: SignIn,
        lockout: Lockout,
        second: SecondFactor,
        settings: Settings,
    ) -> None:
        self._work, self._accounts, self._sessions = work, accounts, sessions
        self._sign_in, self._lockout, self._second, self._settings = sign_in, lockout, second, settings

    async def setup(self, caller: Principal, password: str | None, entry: Entry) -> Seed:
        """Begin the setup of a second factor. Return its seed.

        Raise `Forbidden` (`reauth_required`) without the password, a recent re-authentication or a recent sign-in.
        """
        user = await self._user(caller)
        if user.mfa_enabled:
            raise Conflict("A second factor is already set up; remove it first.", current_status="enabled")
        if password is not None:
            await self._sign_in.check(user.email, password, entry, user_id=user.id)
        elif not caller.has_stepped_up and not await self._work(lambda: self._is_fresh(caller), read=True):
            raise Forbidden("Send your password to set up a second factor.", code="reauth_required")
        return await self._work(lambda: self._second.setup(self._accounts.row(user.id)), entry=entry)

    async def activate(self, caller: Principal, code: str, entry: Entry) -> list[str]:
        """Enable the second factor with its first code. Return the recovery codes."""
        user, session_id = await self._user(caller), caller.session_id or ""

        def unit(key: str) -> list[str] | Problem:
            row = self._accounts.row(user.id)
            codes = self._second.activate(row, session_id, code)
            if codes is None:
                detail = "The code is incorrect; check that the clock of the device is correct."
                return self._sign_in.refuse(key, row.email, row.id, action=ASK_AGAIN, detail=detail)
            self._lockout.give_back(key)  # a valid code for a new seed must not reset the failed passwords
            return codes

        async with self._sign_in.attempt(user.email, entry, action=ASK_AGAIN) as key:
            settled = await self._work(lambda: unit(key), entry=entry)
        return told(settled)

    async def disable(self, caller: Principal, password: str, proof: Proof, entry: Entry) -> UserView:
        """Disable the second factor. Raise `Forbidden` if the policy requires it."""

        def switch_off(row: UserRow) -> UserView:
            self._second.disable(row.id)
            return self._accounts.get(row.id)

        user = await self._user(caller)
        self._second.refuse_if_required(user.role)
        return await self._with_both(user, password, proof, entry, switch_off)

    async def new_codes(self, caller: Principal, password: str, code: str, entry: Entry) -> list[str]:
        """Replace the recovery codes and return the new ones."""
        user = await self._user(caller)
        return await self._with_both(user, password, Proof(code), entry, lambda row: self._second.new_codes(row.id))

    async def step_up(self, caller: Principal, password: str | None, code: str | None, entry: Entry) -> str:
        """Re-authenticate with the password or a code. Return the instant until which this is valid."""
        user, session_id = await self._user(caller), caller.session_id or ""

        def with_password(row: UserRow, key: str) -> str:
            self._sign_in.settle(key, row)
            return self._sessions.step_up(session_id)

        def with_code(key: str) -> str | Problem:
            row = self._accounts.row(user.id)
            if not row.mfa_enabled or not self._sign_in.accepts(row, Proof(code)):
                return self._sign_in.refuse(key, row.email, row.id, action=ASK_AGAIN)
            self._lockout.give_back(key)
            return self._sessions.step_up(session_id)

        if password is not None:
            return await self._sign_in.prove(user.email, password, entry, with_password, user_id=user.id)
        async with self._sign_in.attempt(user.email, entry, action=ASK_AGAIN) as key:
            settled = await self._work(lambda: with_code(key), entry=entry)
        return told(settled)

    # -- helpers

    async def _with_both(
        self, user: UserRow, password: str, proof: Proof, entry: Entry, then: Callable[[UserRow], T]
    ) -> T:
        """Verify the password and the second factor, and run `then` in the same unit of work."""
        if not user.mfa_enabled:
            raise Conflict("No second factor is set up; set one up first.", current_status="disabled")

        def unit(row: UserRow, key: str) -> T | Problem:
            if not self._sign_in.accepts(row, proof):
                return self._sign_in.refuse(key, row.email, row.id, action=ASK_AGAIN)
            self._lockout.clear(key, row.id)
            return then(row)

        return await self._sign_in.prove(user.email, password, entry, unit, user_id=user.id)

    async def _user(self, caller: Principal) -> UserRow:
        return await self._work(lambda: self._accounts.row(_person(caller)), read=True)

    def _is_fresh(self, caller: Principal) -> bool:
        """Return whether the session began within the last `STEP_UP_SECONDS`."""
        begun = SessionRow.created_at > clock.now(-self._settings.get(STEP_UP_SECONDS))
        return bool(SessionRow.select().where((SessionRow.id == caller.session_id) & begun).exists())


def _person(caller: Principal) -> str:
    if caller.user_id is None:
        raise Forbidden("Only people have accounts; sign in as a person.")
    return caller.user_id
