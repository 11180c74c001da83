"""Create the tables for accounts, sessions, tokens, lockouts, second factors, links and invitations."""

from __future__ import annotations

from peewee import BigIntegerField, BooleanField, CharField, IntegerField, Model, ModelIndex, SQL, TextField


def up(migrator, db):
    class User(Model):
        id = CharField(max_length=36, primary_key=True)
        email = CharField(max_length=254)
        email_key = CharField(max_length=254, unique=True)
        full_name = CharField(max_length=200)
        name_key = TextField(null=True)
        role = CharField(max_length=10)
        is_active = BooleanField(default=True)
        email_verified = BooleanField(default=False)
        mfa_enabled = BooleanField(default=False)
        must_change_password = BooleanField(default=False)
        password_hash = TextField(null=True)
        password_changed_at = CharField(max_length=24, null=True)
        timezone = CharField(max_length=64, default="UTC")
        locale = CharField(max_length=20, default="en")
        preferences = TextField(default="{}")
        locked_until = CharField(max_length=24, null=True)
        last_login_at = CharField(max_length=24, null=True)
        purged_at = CharField(max_length=24, null=True)
        created_by = CharField(max_length=36, null=True)
        created_at = CharField(max_length=24)
        updated_at = CharField(max_length=24)
        version = IntegerField(default=1)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_users"
            indexes = ((("created_at", "id"), False), (("role", "is_active"), False))

    class Session(Model):
        id = CharField(max_length=36, primary_key=True)
        user_id = CharField(max_length=36)
        ip = CharField(max_length=45)
        user_agent = CharField(max_length=300)
        mfa = BooleanField(default=False)
        created_at = CharField(max_length=24)
        last_seen_at = CharField(max_length=24)
        expires_at = CharField(max_length=24)
        reauth_until = CharField(max_length=24, null=True)
        ended_at = CharField(max_length=24, null=True)
        end_reason = CharField(max_length=20, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_sessions"
            indexes = ((("ended_at",), False),)

    Session.add_index(Session.user_id, Session.created_at, where=Session.ended_at.is_null())

    class RefreshToken(Model):
        hash = CharField(max_length=64, primary_key=True)
        session_id = CharField(max_length=36, index=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24)
        used_at = CharField(max_length=24, null=True)
        successor = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_refresh_tokens"

    RefreshToken.add_index(RefreshToken.used_at, where=RefreshToken.successor.is_null(False))

    class Ticket(Model):
        hash = CharField(max_length=64, primary_key=True)
        caller = TextField()
        expires_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_tickets"

    class SigningKey(Model):
        id = CharField(max_length=36, primary_key=True)
        sealed = TextField()
        created_at = CharField(max_length=24)
        retired_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_signing_keys"

    class Lockout(Model):
        key = CharField(max_length=64, primary_key=True)
        failed = CharField(max_length=480, default="")
        in_flight = IntegerField(default=0)
        reserved_until = CharField(max_length=24, index=True)
        locked_until = CharField(max_length=24, null=True)
        locks = IntegerField(default=0)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_lockouts"

    class SecondFactor(Model):
        user_id = CharField(max_length=36, primary_key=True)
        seed = TextField()
        last_step = BigIntegerField(default=0)
        created_at = CharField(max_length=24)
        confirmed_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_second_factors"

    class RecoveryCode(Model):
        hash = CharField(max_length=64, primary_key=True)
        user_id = CharField(max_length=36, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_recovery_codes"

    class Challenge(Model):
        hash = CharField(max_length=64, primary_key=True)
        user_id = CharField(max_length=36, index=True)
        tries = IntegerField(default=0)
        expires_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_challenges"

    class FormerPassword(Model):
        id = CharField(max_length=36, primary_key=True)
        user_id = CharField(max_length=36, index=True)
        hash = TextField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_former_passwords"

    class Link(Model):
        id = CharField(max_length=36, primary_key=True)
        kind = CharField(max_length=16)
        subject_id = CharField(max_length=36)
        email = CharField(max_length=254, null=True)
        hash = CharField(max_length=64, null=True, unique=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24, index=True)
        used_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_links"
            indexes = ((("subject_id", "kind"), False),)

    class Invitation(Model):
        id = CharField(max_length=36, primary_key=True)
        email = CharField(max_length=254)
        email_key = CharField(max_length=254, index=True)
        role = CharField(max_length=10)
        status = CharField(max_length=10, default="pending")
        created_by = CharField(max_length=36, null=True)
        accepted_by = CharField(max_length=36, null=True, index=True)
        created_at = CharField(max_length=24)
        expires_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_invitations"
            indexes = ((("created_at", "id"), False),)

    class Installation(Model):
        name = CharField(max_length=40, primary_key=True)
        value = TextField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "accounts_installation"

    pending = SQL("status = 'pending'")
    Invitation.add_index(
        ModelIndex(Invitation, (Invitation.email_key,), unique=True, where=pending, name="accounts_invitations_pending")
    )
    db.create_tables(
        [
            User,
            Session,
            RefreshToken,
            Ticket,
            SigningKey,
            Lockout,
            SecondFactor,
            RecoveryCode,
            Challenge,
            FormerPassword,
            Link,
            Invitation,
            Installation,
        ]
    )
