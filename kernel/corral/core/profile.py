"""What people change of their own account."""

from __future__ import annotations

import zoneinfo
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from corral.auth.addresses import normalise
from corral.core.accounts import AccountsService
from corral.core.api import Address, FullName, Password, UserPatch, UserView
from corral.core.sign_in import SignIn
from corral.database.engine import Work
from corral.database.unit import Entry
from corral.errors import Forbidden, Invalid
from corral.http.answers import IfMatch

PREFERENCES_BYTES = 8 * 1024


class ProfilePatch(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What people change of themselves. `email` needs `current_password`."""

    full_name: FullName | UnsetType = UNSET
    timezone: Annotated[str, Meta(min_length=1, max_length=64)] | UnsetType = UNSET
    locale: Annotated[str, Meta(pattern="^[a-z]{2,3}(-[A-Za-z0-9]{2,8}){0,2}(?![\\s\\S])")] | UnsetType = UNSET
    preferences: dict[str, Any] | UnsetType = UNSET
    email: Address | UnsetType = UNSET
    current_password: Password | UnsetType = UNSET


class Profile:
    """Changes of the own account, checked before the unit."""

    def __init__(self, work: Work, accounts: AccountsService, sign_in: SignIn) -> None:
        self._work, self._accounts, self._sign_in = work, accounts, sign_in

    async def update(self, user_id: str, patch: ProfilePatch, if_match: IfMatch, entry: Entry) -> UserView:
        """Change what the patch names; another address costs the password."""
        _check(patch)
        user = await self._work(lambda: self._accounts.get(user_id), read=True)
        if isinstance(patch.email, str) and normalise(patch.email) != normalise(user.email):
            if not isinstance(patch.current_password, str):
                raise Forbidden("Send current_password to change the address.", code="reauth_required")
            await self._sign_in.check(user.email, patch.current_password, entry, pointer="/current_password")
        changes = UserPatch(
            full_name=patch.full_name, timezone=patch.timezone, locale=patch.locale,
            preferences=patch.preferences, email=patch.email,
        )  # fmt: skip
        return await self._work(lambda: self._accounts.update(user_id, changes, if_match=if_match), entry=entry)


def _check(patch: ProfilePatch) -> None:
    if isinstance(patch.timezone, str):
        try:
            zoneinfo.ZoneInfo(patch.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise Invalid.at("/timezone", "not_allowed", "Give an IANA zone such as Europe/Berlin or UTC.") from None
    if not isinstance(patch.preferences, UnsetType) and len(msgspec.json.encode(patch.preferences)) > PREFERENCES_BYTES:
        raise Invalid.at("/preferences", "too_long", f"At most {PREFERENCES_BYTES} bytes of JSON.")
