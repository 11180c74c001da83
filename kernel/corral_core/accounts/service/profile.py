"""Changes that users make to their own profile."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Conflict, Forbidden, Invalid
from corral.http.answers import IfMatch
from corral.plugin import Settings
from corral_core.accounts.api import Address, FullName, Password, UserPatch, UserView
from corral_core.accounts.models import UserRow
from corral_core.accounts.service.accounts import AccountsService
from corral_core.accounts.service.addresses import check_address, normalise
from corral_core.accounts.service.links import CHANGE_EMAIL, Links
from corral_core.accounts.service.mail import MailService
from corral_core.accounts.service.sign_in import SignIn
from corral_core.accounts.settings import EMAIL_VERIFICATION

PREFERENCES_BYTES = 8 * 1024


class ProfilePatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A partial update of the user's own profile. A change of `email` requires `current_password`."""

    full_name: FullName | UnsetType = UNSET
    timezone: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    locale: Annotated[str, Meta(pattern="^[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}(?![\\s\\S])")] | UnsetType = UNSET
    preferences: dict[str, Any] | UnsetType = UNSET
    email: Address | UnsetType = UNSET
    current_password: Password | UnsetType = UNSET


class Profile:
    """Updates the user's own profile. Values are validated before the unit of work."""

    def __init__(
        self,
        work: Work,
        accounts: AccountsService,
        sign_in: SignIn,
        links: Links,
        mail: MailService,
        settings: Settings,
    ) -> None:
        self._work, self._accounts, self._sign_in = work, accounts, sign_in
        self._links, self._mail, self._settings = links, mail, settings

    async def update(self, user_id: str, patch: ProfilePatch, if_match: IfMatch, entry: Entry) -> UserView:
        """Apply a patch to the user's own profile. A new address requires the password.

        If addresses must be verified, a new address takes effect when the user opens the link that is mailed to it.
        """
        _check(patch)
        user = await self._work(lambda: self._accounts.get(user_id), read=True)
        moves = isinstance(patch.email, str) and normalise(patch.email) != normalise(user.email)
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
                self._ask(user_id, to)
            return self._accounts.update(user_id, changes, if_match=if_match, verified=False)

        def proved(row: UserRow, key: str) -> UserView:
            self._sign_in.settle(key, row)
            return unit()

        if not moves:
            return await self._work(unit, entry=entry)
        password, pointer = patch.current_password, "/current_password"
        if not isinstance(password, str):
            raise Forbidden("Send current_password to change the address.", code="reauth_required")
        return await self._sign_in.prove(user.email, password, entry, proved, pointer=pointer, user_id=user_id)

    def _ask(self, user_id: str, email: str) -> None:
        """Mail a verification link to a new address. The address takes effect when the link is used."""
        check_address(email)
        if self._accounts.row_of(email) is not None:
            raise Conflict("Another account already has this email address.", code="duplicate")
        self._links.end(user_id, (CHANGE_EMAIL,))
        self._mail.send_link(email.strip(), CHANGE_EMAIL, user_id)


def _check(patch: ProfilePatch) -> None:
    if isinstance(patch.timezone, str):
        try:
            zoneinfo.ZoneInfo(patch.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise Invalid.at(
                "/timezone", "not_allowed", "Give an IANA time zone such as Europe/Berlin or UTC."
            ) from None
    if not isinstance(patch.preferences, UnsetType) and len(msgspec.json.encode(patch.preferences)) > PREFERENCES_BYTES:
        raise Invalid.at("/preferences", "too_long", f"At most {PREFERENCES_BYTES} bytes of JSON.")
