"""Actions that users perform on their own accounts: re-authentication, second-factor setup, and profile changes."""

from __future__ import annotations

import zoneinfo
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral import clock
from corral.auth.principal import Principal
from corral.database.engine import Work
from corral.database.unit import UnitContext
from corral.errors import Conflict, Forbidden, Invalid, Problem
from corral.http.answers import IfMatch
from corral.plugin import Settings
from corral.schema.fields import text_format
from corral_core.accounts.api import Address, FullName, Password, UserPatch, UserView
from corral_core.accounts.models import SessionRow, UserRow
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.email_addresses import normalize_address, validate_email
from corral_core.accounts.service.links import CHANGE_EMAIL, SingleUseLinks
from corral_core.accounts.service.lockout import Lockout
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.second_factor import NewSeed, SecondFactor
from corral_core.accounts.service.sessions import Sessions
from corral_core.accounts.service.sign_in import ASK_AGAIN, FactorProof, SignIn, raise_if_problem
from corral_core.accounts.settings import EMAIL_VERIFICATION, STEP_UP_SECONDS

T = TypeVar("T")


class OwnSecondFactor:
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

    async def start_setup(self, caller: Principal, password: str | None, entry: UnitContext) -> NewSeed:
        """Begin setting up a second factor. Return its seed.

        Raise `Forbidden` (`reauth_required`) if the password is missing and the user has not recently signed in or
        re-authenticated.
        """
        user = await self._require_user(caller)
        if user.mfa_enabled:
            raise Conflict("A second factor is already set up; remove it first.", current_status="enabled")
        if password is not None:
            await self._sign_in.check_password(user.email, password, entry, user_id=user.id)
        elif not caller.has_stepped_up and not await self._work(lambda: self._is_session_recent(caller), read=True):
            raise Forbidden(
                "Setting up a second factor requires your password; send it as `password`.", code="reauth_required"
            )
        return await self._work(lambda: self._second.start_setup(self._accounts.get_row(user.id)), entry=entry)

    async def activate(self, caller: Principal, code: str, entry: UnitContext) -> list[str]:
        """Enable the second factor after verifying its first code. Return the recovery codes."""
        user, session_id = await self._require_user(caller), caller.session_id or ""

        def unit(key: str) -> list[str] | Problem:
            row = self._accounts.get_row(user.id)
            codes = self._second.activate(row, session_id, code)
            if codes is None:
                detail = "The code is incorrect; check that the clock of the device is correct."
                return self._sign_in.settle_failure(key, row.email, row.id, action=ASK_AGAIN, detail=detail)
            self._lockout.release_attempt(key)  # a valid code for a new seed must not reset the failed passwords
            return codes

        async with self._sign_in.reserve_attempt(user.email, entry, action=ASK_AGAIN) as key:
            settled = await self._work(lambda: unit(key), entry=entry)
        return raise_if_problem(settled)

    async def disable(self, caller: Principal, password: str, proof: FactorProof, entry: UnitContext) -> UserView:
        """Disable the second factor. Raise `Forbidden` if the policy requires it."""

        def switch_off(row: UserRow) -> UserView:
            self._second.disable(row.id)
            return self._accounts.get(row.id)

        user = await self._require_user(caller)
        self._second.refuse_if_required(user.role)
        return await self._check_both_factors(user, password, proof, entry, switch_off)

    async def renew_recovery_codes(self, caller: Principal, password: str, code: str, entry: UnitContext) -> list[str]:
        """Replace the recovery codes and return the new ones."""
        user = await self._require_user(caller)
        return await self._check_both_factors(
            user, password, FactorProof(code), entry, lambda row: self._second.new_codes(row.id)
        )

    async def step_up(self, caller: Principal, password: str | None, code: str | None, entry: UnitContext) -> str:
        """Re-authenticate with the password or a code. Return the time until which the re-authentication is valid."""
        user, session_id = await self._require_user(caller), caller.session_id or ""

        def with_password(row: UserRow, key: str) -> str:
            self._sign_in.settle_success(key, row)
            return self._sessions.step_up(session_id)

        def with_code(key: str) -> str | Problem:
            row = self._accounts.get_row(user.id)
            if not row.mfa_enabled or not self._sign_in.consume_factor(row, FactorProof(code)):
                return self._sign_in.settle_failure(key, row.email, row.id, action=ASK_AGAIN)
            self._lockout.release_attempt(key)
            return self._sessions.step_up(session_id)

        if password is not None:
            return await self._sign_in.verify_and_run(user.email, password, entry, with_password, user_id=user.id)
        async with self._sign_in.reserve_attempt(user.email, entry, action=ASK_AGAIN) as key:
            settled = await self._work(lambda: with_code(key), entry=entry)
        return raise_if_problem(settled)

    # -- helpers

    async def _check_both_factors(
        self, user: UserRow, password: str, proof: FactorProof, entry: UnitContext, then: Callable[[UserRow], T]
    ) -> T:
        """Verify the password, then verify the second factor and run `then` in one unit of work."""
        if not user.mfa_enabled:
            raise Conflict("No second factor is set up; set one up first.", current_status="disabled")

        def unit(row: UserRow, key: str) -> T | Problem:
            if not self._sign_in.consume_factor(row, proof):
                return self._sign_in.settle_failure(key, row.email, row.id, action=ASK_AGAIN)
            self._lockout.settle_success(key, row.id)
            return then(row)

        return await self._sign_in.verify_and_run(user.email, password, entry, unit, user_id=user.id)

    async def _require_user(self, caller: Principal) -> UserRow:
        return await self._work(lambda: self._accounts.get_row(_require_person(caller)), read=True)

    def _is_session_recent(self, caller: Principal) -> bool:
        """Return whether the session began within the step-up period (`STEP_UP_SECONDS`)."""
        begun = SessionRow.created_at > clock.now(-self._settings.get(STEP_UP_SECONDS))
        return bool(SessionRow.select().where((SessionRow.id == caller.session_id) & begun).exists())


def _require_person(caller: Principal) -> str:
    if caller.user_id is None:
        raise Forbidden("This operation needs a user account; sign in as a user.")
    return caller.user_id


PREFERENCES_BYTES = 8 * 1024


class ProfilePatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes to the user's own profile. Changing `email` requires `current_password`."""

    full_name: FullName | UnsetType = UNSET
    timezone: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    locale: (
        Annotated[
            str, text_format("^[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}(?![\\s\\S])", "a language, such as en, de or pt-BR")
        ]
        | UnsetType
    ) = UNSET
    preferences: dict[str, Any] | UnsetType = UNSET
    email: Address | UnsetType = UNSET
    current_password: Password | UnsetType = UNSET


class ProfileChanges:
    """Updates the user's own profile. Values are validated before the unit of work begins."""

    def __init__(
        self,
        work: Work,
        accounts: AccountsService,
        sign_in: SignIn,
        links: SingleUseLinks,
        mail: MailService,
        settings: Settings,
    ) -> None:
        self._work, self._accounts, self._sign_in = work, accounts, sign_in
        self._links, self._mail, self._settings = links, mail, settings

    async def update_profile(
        self, user_id: str, patch: ProfilePatch, if_match: IfMatch, entry: UnitContext
    ) -> UserView:
        """Apply a patch to the user's own profile. Changing the email address requires the password.

        If addresses must be verified, a new address takes effect when the user opens the link sent to it. Raise
        `Forbidden` (`reauth_required`) if the password is required but missing, and `Invalid` if the time zone is
        unknown or the preferences are too large.
        """
        _check_patch(patch)
        user = await self._work(lambda: self._accounts.get(user_id), read=True)
        moves = isinstance(patch.email, str) and normalize_address(patch.email) != normalize_address(user.email)
        to = patch.email if moves and self._settings.get(EMAIL_VERIFICATION) else UNSET
        changes = UserPatch(
            full_name=patch.full_name,
            timezone=patch.timezone,
            locale=patch.locale,
            preferences=patch.preferences,
            email=patch.email if isinstance(to, UnsetType) else UNSET,
        )

        def unit() -> UserView:
            if isinstance(to, str):
                self._request_address_change(user_id, to)
            return self._accounts.update(user_id, changes, if_match=if_match, verified=False)

        def proved(row: UserRow, key: str) -> UserView:
            self._sign_in.settle_success(key, row)
            return unit()

        if not moves:
            return await self._work(unit, entry=entry)
        password, pointer = patch.current_password, "/current_password"
        if not isinstance(password, str):
            raise Forbidden("Send current_password to change the email address.", code="reauth_required")
        return await self._sign_in.verify_and_run(user.email, password, entry, proved, pointer=pointer, user_id=user_id)

    def _request_address_change(self, user_id: str, email: str) -> None:
        """Email a verification link to the new address, which takes effect when the user opens the link."""
        validate_email(email)
        if self._accounts.find_row(email) is not None:
            raise Conflict("Another account already has this email address.", code="duplicate")
        self._links.end_links(user_id, (CHANGE_EMAIL,))
        self._mail.send_link(email.strip(), CHANGE_EMAIL, user_id)


def _check_patch(patch: ProfilePatch) -> None:
    if isinstance(patch.timezone, str):
        try:
            zoneinfo.ZoneInfo(patch.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise Invalid.at(
                "/timezone", "not_allowed", "Give an IANA time zone such as Europe/Berlin or UTC."
            ) from None
    if not isinstance(patch.preferences, UnsetType) and len(msgspec.json.encode(patch.preferences)) > PREFERENCES_BYTES:
        raise Invalid.at("/preferences", "too_long", f"At most {PREFERENCES_BYTES} bytes of JSON.")
