"""The request and response bodies for users and invitations."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from corral_core.accounts.api import Address, FullName, InvitationView, Password, Role, UserView


class AdminUserView(UserView, kw_only=True):
    """An account as shown to admins.

    `sessions` and `api_keys` say how many sessions and API keys the user has. `failed_attempts` is the number of
    failed sign-ins within the lockout window.
    """

    created_by: str | None
    sessions: int
    api_keys: int
    failed_attempts: int


class CreatedUser(AdminUserView, kw_only=True):
    """A new account.

    `set_password_url` is the link for choosing a password. The link is present only if the account has no password and
    no mail server is configured. It is shown only once.
    """

    set_password_url: str | UnsetType = UNSET


class NewUserBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields for creating an account as an admin. If no password is given, the user chooses one through a link."""

    email: Address
    full_name: FullName
    password: Password | None = None
    role: Role = "member"
    must_change_password: bool = False


class UserChange(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Changes that an admin can make to an account. Absent fields stay unchanged."""

    email: Address | UnsetType = UNSET
    full_name: FullName | UnsetType = UNSET
    role: Role | UnsetType = UNSET
    is_active: (
        Annotated[bool, msgspec.Meta(description="If false, the account is deactivated and all its sessions end.")]
        | UnsetType
    ) = UNSET
    must_change_password: bool | UnsetType = UNSET


class ResetLink(msgspec.Struct, kw_only=True):
    """A link for choosing a new password. It is shown only once, works only once, and expires after 30 minutes."""

    reset_url: str


class NewInvitation(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The email address to invite, and the role of the new account."""

    email: Address
    role: Role = "member"


class IssuedInvitation(InvitationView, kw_only=True):
    """A new invitation. `url` is the link for creating the account. It is shown only once."""

    url: str
