"""Tables of accounts: people, sessions and tokens, failed attempts, second factors, links and invitations."""

from __future__ import annotations

import peewee

from corral.database.model import PRIVATE, IdField, InstantField, JSONField, Model
from corral.database.sealed import SealedField
from corral.events.event import PRIVATE_AND_ADMIN


class UserRow(Model):
    """A user. `email` is the address as typed; `email_key` is its normal form, unique and used for look-ups."""

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
    password_hash = peewee.TextField(null=True)  # null: nobody can sign in with a password
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
    """A session: a chain of refresh tokens. It ends at `ended_at`, or at `expires_at` if it is not refreshed."""

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
    """A refresh token, by its SHA-256. `successor` is sealed and kept for the grace period, for repeated requests."""

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
    """A key that signs access tokens, sealed. A retired key verifies until its last token expires."""

    id = IdField(primary_key=True)
    sealed = SealedField()
    created_at = InstantField()
    retired_at = InstantField(null=True)

    class Meta:
        table_name = "accounts_signing_keys"


class TicketRow(Model):
    """A single-use ticket, by its SHA-256; it opens one WebSocket for the caller that requested it."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    caller = JSONField()
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "accounts_tickets"


class LockoutRow(Model):
    """Sign-in attempts for one address, known or not. `key` is the SHA-256 of its normal form.

    `failed`: the instants of the last failures, the newest first, one after the other. `in_flight` counts until
    `reserved_until`: what a dead process reserved is free again then. `locks`: how often in a row it was locked.
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
    """The TOTP seed of a user; an unconfirmed one is a setup that waits for its first code.

    `last_step`: the newest time step whose code was accepted; only later steps are valid.
    """

    user_id = IdField(primary_key=True)
    seed = SealedField()
    last_step = peewee.BigIntegerField(default=0)
    created_at = InstantField()
    confirmed_at = InstantField(null=True)

    class Meta:
        table_name = "accounts_second_factors"


class RecoveryCodeRow(Model):
    """An unused recovery code, by its SHA-256."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    user_id = IdField(index=True)

    class Meta:
        table_name = "accounts_recovery_codes"


class ChallengeRow(Model):
    """A sign-in that waits for its second factor, by the SHA-256 of its `mfa_token`."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    user_id = IdField(index=True)
    tries = peewee.IntegerField(default=0)
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "accounts_challenges"


class FormerPasswordRow(Model):
    """The hash of a former password."""

    id = IdField(primary_key=True)
    user_id = IdField(index=True)
    hash = peewee.TextField()

    class Meta:
        table_name = "accounts_former_passwords"


class LinkRow(Model):
    """A single-use link: it resets a password, verifies an address or accepts an invitation.

    `hash` is the SHA-256 of the token; null while the link waits for a mail server to take its mail. `subject_id` is
    the account or invitation, `email` the address that the link proves. `used_at` also ends what was not used.
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
    """An invitation to create an account with this role. `status`: pending | accepted | expired | revoked."""

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


# one address has one invitation at a time
InvitationRow.add_index(
    peewee.ModelIndex(
        InvitationRow,
        (InvitationRow.email_key,),
        unique=True,
        where=peewee.SQL("status = 'pending'"),
        name="accounts_invitations_pending",
    )
)


class InstallationRow(Model):
    """A fact about the whole installation; the first process to insert the row decides it."""

    name = peewee.CharField(primary_key=True, max_length=40)
    value = peewee.TextField()

    class Meta:
        table_name = "accounts_installation"


def claim(name: str, value: str) -> bool:
    """Decide a fact; returns False if it was decided before."""
    insert = InstallationRow.insert(name=name, value=value).on_conflict_ignore()
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
    InstallationRow,
)
