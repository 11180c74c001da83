"""The database tables for stored settings, their history, and the version by which processes detect changes."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.sealed_columns import SealedField

STATE = 1


class ValueRow(Model):
    """A stored setting. Resetting the setting keeps the row, so that the setting's version never decreases."""

    name = peewee.CharField(primary_key=True, max_length=80)
    is_set = peewee.BooleanField()
    value = JSONField(null=True)
    sealed = SealedField(null=True)  # the value, if the setting is secret
    version = peewee.IntegerField()
    updated_at = InstantField()
    updated_by = IdField(null=True)

    class Meta:
        table_name = "settings_values"


class ChangeRow(Model):
    """A change to a setting. For a secret setting, neither the old value nor the new value is stored."""

    id = IdField(primary_key=True)
    category = peewee.CharField(max_length=64)
    key = peewee.CharField(max_length=64)
    before = JSONField(null=True)
    after = JSONField(null=True)
    by = IdField(null=True)
    at = InstantField()

    class Meta:
        table_name = "settings_history"
        indexes = ((("at", "id"), False), (("category", "key", "at", "id"), False))


class StateRow(Model):
    """The version of all stored settings. The table has only one row, whose id is the constant `STATE`.

    The version increases with every change. Units of work that change settings lock this row, so that only one of them
    runs at a time.
    """

    id = peewee.IntegerField(primary_key=True)
    version = peewee.BigIntegerField()

    class Meta:
        table_name = "settings_state"


class OutdatedProcessRow(Model):
    """A process that still uses old values of settings, because new values require a restart.

    The process renews the row regularly.
    """

    process = IdField(primary_key=True)
    names = JSONField()
    seen_at = InstantField(index=True)

    class Meta:
        table_name = "settings_outdated"


TABLES = (ValueRow, ChangeRow, StateRow, OutdatedProcessRow)
