"""What the routes take and show of people and invitations."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from corral_core.accounts.api import Address, FullName, InvitationView, Password, Role, UserView


class AdminUserView(UserView, kw_only=True):
    """An account as admins see it. `sessions` and `api_keys` are counts; `failed_attempts` those that still count."""

    created_by: str | None
    sessions: int
    api_keys: int
    failed_attempts: int


class CreatedUser(AdminUserView, kw_only=True):
    """`set_password_url`: without a password and a mail service, the link to choose one, shown this once."""

    set_password_url: str | UnsetType = UNSET


class NewUserBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """An account as an admin makes it. Without a password its holder chooses one by a link."""

    email: Address
    full_name: FullName
    password: Password | None = None
    role: Role = "member"
    must_change_password: bool = False


class UserChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What an admin may change of an account; absent fields stay."""

    email: Address | UnsetType = UNSET
    full_name: FullName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    is_active: Annotated[bool, msgspec.Meta(description="false deactivates and ends every session")] | UnsetType = UNSET
    must_change_password: bool | UnsetType = UNSET


class ResetLink(msgspec.Struct, kw_only=True):
    """Where the user chooses a new password, once, within 30 minutes; shown this once."""

    reset_url: str


class NewInvitation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whom to invite, and as what."""

    email: Address
    role: Role = "member"


class IssuedInvitation(InvitationView, kw_only=True):
    """A new invitation. `url` leads to the account that is to be made; shown this once."""

    url: str
