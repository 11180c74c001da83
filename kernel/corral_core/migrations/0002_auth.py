"""Failed sign-ins, second factors, sign-ins that wait for one, and former passwords."""

from __future__ import annotations

from peewee import BigIntegerField, CharField, IntegerField, Model, TextField


def up(migrator, db):
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
            table_name = "core_lockouts"

    class SecondFactor(Model):
        user_id = CharField(max_length=36, primary_key=True)
        seed = TextField()
        last_step = BigIntegerField(default=0)
        created_at = CharField(max_length=24)
        confirmed_at = CharField(max_length=24, null=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_second_factors"

    class RecoveryCode(Model):
        hash = CharField(max_length=64, primary_key=True)
        user_id = CharField(max_length=36, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_recovery_codes"

    class Challenge(Model):
        hash = CharField(max_length=64, primary_key=True)
        user_id = CharField(max_length=36, index=True)
        tries = IntegerField(default=0)
        expires_at = CharField(max_length=24, index=True)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_challenges"

    class FormerPassword(Model):
        id = CharField(max_length=36, primary_key=True)
        user_id = CharField(max_length=36, index=True)
        hash = TextField()

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "core_former_passwords"

    db.create_tables([Lockout, SecondFactor, RecoveryCode, Challenge, FormerPassword])
