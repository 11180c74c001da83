"""The kernel's tables: accounts, the event log, jobs, leases, kept answers and plugin states."""

from __future__ import annotations

from peewee import (
    BigAutoField,
    BigIntegerField,
    BooleanField,
    CharField,
    IntegerField,
    Model,
    TextField,
)


def up(migrator, db):
    _accounts(db)
    _log_and_jobs(db)


def _accounts(db):
    class User(Model):
        id = CharField(max_length=36, primary_key=True)
        email = CharField(max_length=254)
        email_key = CharField(max_length=254, unique=True)
        full_name = CharField(max_length=200)
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
            table_name = "core_users"
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
            table_name = "core_sessions"
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
            table_name = "core_refresh_tokens"

    RefreshToken.add_index(RefreshToken.used_at, where=RefreshToken.successor.is_null(False))

    class Ticket(Model):
        hash = CharField(max_length=64, primary_key=True)
        caller = TextField()
        expires_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_tickets"

    class SigningKey(Model):
        id = CharField(max_length=36, primary_key=True)
        sealed = TextField()
        created_at = CharField(max_length=24)
        retired_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_signing_keys"

    class Installation(Model):
        name = CharField(max_length=40, primary_key=True)
        value = TextField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_installation"

    class PluginState(Model):
        name = CharField(max_length=64, primary_key=True)
        state = CharField(max_length=16)
        reason = TextField(null=True)
        since = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_plugin_states"

    db.create_tables([User, Session, RefreshToken, Ticket, SigningKey, Installation, PluginState])


def _log_and_jobs(db):
    class Event(Model):
        ins = BigAutoField()
        seq = BigIntegerField(null=True, unique=True)
        id = CharField(max_length=36, unique=True)
        type = CharField(max_length=100)
        ts = CharField(max_length=24)
        actor_type = CharField(max_length=20)
        actor_id = CharField(max_length=80, null=True)
        object_type = CharField(max_length=60)
        object_id = CharField(max_length=80)
        owner_id = CharField(max_length=36, null=True)
        visibility = CharField(max_length=20)
        data = TextField()
        cause = TextField(default="[]")

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_events"
            indexes = ((("object_id", "ins"), False),)

    class Consumer(Model):
        name = CharField(max_length=100, primary_key=True)
        cursor = BigIntegerField(default=0)
        failures = IntegerField(default=0)
        updated_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_consumers"

    class Job(Model):
        id = CharField(max_length=36, primary_key=True)
        name = CharField(max_length=100)
        arguments = TextField(default="{}")
        state = CharField(max_length=10, default="queued")
        run_at = CharField(max_length=24)
        attempts = IntegerField(default=0)
        lease = CharField(max_length=36, null=True)
        error = TextField(null=True)
        created_at = CharField(max_length=24)
        finished_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_jobs"
            indexes = ((("state", "run_at"), False),)

    class Schedule(Model):
        name = CharField(max_length=100, primary_key=True)
        next_at = CharField(max_length=24)
        last_at = CharField(max_length=24, null=True)
        error = TextField(null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_schedules"

    class Lease(Model):
        name = CharField(max_length=120, primary_key=True)
        holder = CharField(max_length=80)
        until = CharField(max_length=24)
        fence = BigIntegerField(default=0)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_leases"

    class Idempotency(Model):
        key = CharField(max_length=64, primary_key=True)
        body_hash = CharField(max_length=64)
        status = IntegerField(null=True)
        headers = TextField(null=True)
        body = TextField(null=True)
        sealed = BooleanField(default=False)
        state = CharField(max_length=12)
        until = CharField(max_length=24, index=True)
        created_at = CharField(max_length=24)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_idempotency"

    db.create_tables([Event, Consumer, Job, Schedule, Lease, Idempotency])
