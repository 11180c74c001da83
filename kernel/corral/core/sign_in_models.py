"""Tables of sign-in beside people and sessions: failed attempts, second factors, and former passwords."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, Model
from corral.database.sealed import SealedField


class LockoutRow(Model):
    """Attempts to sign in to one address, which need not be anybody's: `key` is the SHA-256 of its normal form.

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
        table_name = "core_lockouts"


class SecondFactorRow(Model):
    """The TOTP seed of a user; one that was not confirmed is a setup that waits for its first code.

    `last_step`: the newest time step whose code was accepted; only later ones are.
    """

    user_id = IdField(primary_key=True)
    seed = SealedField()
    last_step = peewee.BigIntegerField(default=0)
    created_at = InstantField()
    confirmed_at = InstantField(null=True)

    class Meta:
        table_name = "core_second_factors"


class RecoveryCodeRow(Model):
    """A recovery code that was not used yet, by its SHA-256."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    user_id = IdField(index=True)

    class Meta:
        table_name = "core_recovery_codes"


class ChallengeRow(Model):
    """A sign-in that waits for its second factor, by the SHA-256 of its `mfa_token`."""

    hash = peewee.CharField(primary_key=True, max_length=64)
    user_id = IdField(index=True)
    tries = peewee.IntegerField(default=0)
    expires_at = InstantField(index=True)

    class Meta:
        table_name = "core_challenges"


class FormerPasswordRow(Model):
    """The hash of a password that its user had before."""

    id = IdField(primary_key=True)
    user_id = IdField(index=True)
    hash = peewee.TextField()

    class Meta:
        table_name = "core_former_passwords"


TABLES = (LockoutRow, SecondFactorRow, RecoveryCodeRow, ChallengeRow, FormerPasswordRow)
