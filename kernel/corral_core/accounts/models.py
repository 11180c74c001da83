"""The tables for accounts, sessions, tokens, lockouts, second factors, links and invitations."""

from __future__ import annotations

import peewee

from corral.database.model import PRIVATE, PRIVATE_AND_ADMIN, IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField


class UserRow(Model):
    """A user account. `email` is the address as entered.

    `email_key` is its normal form, which is unique and used for lookups.
    """

    visibility = PRIVATE_AND_ADMIN
    owner_field = "id"

    id = IdField(primary_key=True)
    email = peewee.CharField(max_length=254)
    email_key = peewee.CharField(max_length=254, unique=True)
    full_name = peewee.CharField(max_length=200)
    name_key = peewee.TextField(null=True)  # the normal form of `full_name`, for search
    role = peewee.CharField(max_length=10)
    is_active = peewee.BooleanField(default=True)
    email_verified = peewee.BooleanField(default=False)
    mfa_enabled = peewee.BooleanField(default=False)
    must_change_password = peewee.BooleanField(default=False)
    password_hash = peewee.TextField(null=True)  # null: sign-in with a password is impossible
    password_changed_at = InstantField(null=True)
    timezone = peewee.CharField(max_length=64, default="UTC")
    locale = peewee.CharField(max_length=20, default="en")
    preferences = JSONField(default=dict)
    locked_until = InstantField(null=True)
    last_login_at = InstantField(null=True)
    purged_at = InstantField(null=True)
    created_by = IdField(null=True)
    created_at = InstantField()
    updated_at = InstantField()
    version = peewee.IntegerField(default=1)

    class Meta:
        table_name = "accounts_users"
        indexes = ((("created_at", "id"), False), (("role", "is_active"), False))


class SessionRow(Model):
    """A session of a user, which consists of a chain of refresh tokens.

    `ended_at` is the time at which the session ended. A session that is not refreshed expires at `expires_at`.
    """

    visibility = PRIVATE
    owner_field = "user_id"

    id = IdField(primary_key=True)
    user_id = IdField()
    ip = peewee.CharField(max_length=45)
    user_agent = peewee.CharField(max_length=300)
    mfa = peewee.BooleanField(default=False)
    created_at = InstantField()
    last_seen_at = InstantField()
    expires_at = InstantField()
    reauth_until = InstantField(null=True)
    ended_at = InstantField(null=True)
    end_reason = peewee.CharField(max_length=20, null=True)

    class Meta:
        table_name = "accounts_sessions"
        indexes = ((("ended_at",), False),)


SessionRow.add_index(SessionRow.user_id, SessionRow.created_at, where=SessionRow.ended_at.is_null())


class RefreshRow(Model):
    """A refresh token, identified by its SHA-256 hash.

    `successor` is the encrypted next token. It is kept during the grace period, so that a repeated request receives the
    same token again.
    """

    hash = peewee.CharField(primary_key=True, max_length=64)
    session_id = IdField(index=True)
    created_at = InstantField()
    expires_at = InstantField()
    used_at = InstantField(null=True)
    successor = SealedField(null=True)

    class Meta:
        table_name = "accounts_refresh_tokens"


RefreshRow.add_index(RefreshRow.used_at, where=RefreshRow.successor.is_null(False))


class SigningKeyRow(Model):
    """An encrypted key for signing access tokens.

    A retired key can still verify tokens until the last token signed with it expires.
    """

    id = IdField(primary_key=True)
    sealed = SealedField()
    created_at = InstantField()
    retired_at = InstantField(null=True)

    class Meta:
        table_name = "accounts_signing_keys"


class TicketRow(Model):
    """A single-use ticket, identified by its SHA-256 hash.

    It opens one WebSocket for the caller that requested the ticket.
    """

    hash = peewee.CharField(primary_key=True, max_length=64)
    caller = JSONField()
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "accounts_tickets"


class LockoutRow(Model):
    """The sign-in attempts for one email address. The address need not belong to an account.

    `key` is the SHA-256 hash of the address in normal form. `failed` contains the times of the last failures as one
    string, newest first. `in_flight` is the number of reserved attempts; it is ignored after `reserved_until`, so the
    reservations of a crashed process expire. `locks` is the number of consecutive lockouts.
    """

    key = peewee.CharField(primary_key=True, max_length=64)
    failed = peewee.CharField(max_length=480, default="")
    in_flight = peewee.IntegerField(default=0)
    reserved_until = InstantField(index=True)
    locked_until = InstantField(null=True)
    locks = peewee.IntegerField(default=0)

    class Meta:
        table_name = "accounts_lockouts"


class SecondFactorRow(Model):
    """The TOTP seed of a user. If `confirmed_at` is null, the setup still awaits its first code.

    `last_step` is the newest time step whose code was accepted. Only codes for later steps are valid.
    """

    user_id = IdField(primary_key=True)
    seed = SealedField()
    last_step = peewee.BigIntegerField(default=0)
    created_at = InstantField()
    confirmed_at = InstantField(null=True)

    class Meta:
        table_name = "accounts_second_factors"


class RecoveryCodeRow(Model):
    """An unused recovery code, identified by its SHA-256 hash."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    user_id = IdField(index=True)

    class Meta:
        table_name = "accounts_recovery_codes"


class ChallengeRow(Model):
    """A sign-in whose second factor is pending, identified by the SHA-256 hash of its `mfa_token`."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    user_id = IdField(index=True)
    tries = peewee.IntegerField(default=0)
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "accounts_challenges"


class FormerPasswordRow(Model):
    """The hash of a user's previous password."""

    id = IdField(primary_key=True)
    user_id = IdField(index=True)
    hash = peewee.TextField()

    class Meta:
        table_name = "accounts_former_passwords"


class LinkRow(Model):
    """A single-use link that resets a password, verifies an email address or accepts an invitation.

    `hash` is the SHA-256 hash of the token, or null until the email with the link is sent. `subject_id` identifies the
    account or the invitation. `email` is the address that the link verifies. `used_at` is the time at which the link
    was used or invalidated.
    """

    id = IdField(primary_key=True)
    kind = peewee.CharField(max_length=16)
    subject_id = IdField()
    email = peewee.CharField(max_length=254, null=True)
    hash = peewee.CharField(max_length=64, null=True, unique=True)
    created_at = InstantField()
    expires_at = InstantField(index=True)
    used_at = InstantField(null=True)

    class Meta:
        table_name = "accounts_links"
        indexes = ((("subject_id", "kind"), False),)


class InvitationRow(Model):
    """An invitation to create an account with a given role.

    `status` is `pending`, `accepted`, `expired` or `revoked`.
    """

    id = IdField(primary_key=True)
    email = peewee.CharField(max_length=254)
    email_key = peewee.CharField(max_length=254, index=True)
    role = peewee.CharField(max_length=10)
    status = peewee.CharField(max_length=10, default="pending")
    created_by = IdField(null=True)
    accepted_by = IdField(null=True, index=True)
    created_at = InstantField()
    expires_at = InstantField()

    class Meta:
        table_name = "accounts_invitations"
        indexes = ((("created_at", "id"), False),)


# an address has at most one pending invitation
InvitationRow.add_index(
    peewee.ModelIndex(
        InvitationRow,
        (InvitationRow.email_key,),
        unique=True,
        where=peewee.SQL("status = 'pending'"),
        name="accounts_invitations_pending",
    )
)


class InstallationValueRow(Model):
    """A value that is set once for the whole installation, such as the installation's id.

    The first process that inserts the row determines the value.
    """

    name = peewee.CharField(primary_key=True, max_length=40)
    value = peewee.TextField()

    class Meta:
        table_name = "accounts_installation"


def set_installation_value_once(name: str, value: str) -> bool:
    """Set a value of the installation, such as its id, unless it is already set. Return whether this call set it."""
    insert = InstallationValueRow.insert(name=name, value=value).on_conflict_ignore()
    return bool(insert.as_rowcount().execute())


TABLES = (
    UserRow,
    SessionRow,
    RefreshRow,
    SigningKeyRow,
    TicketRow,
    LockoutRow,
    SecondFactorRow,
    RecoveryCodeRow,
    ChallengeRow,
    FormerPasswordRow,
    LinkRow,
    InvitationRow,
    InstallationValueRow,
)
