"""Stored values, the history of their changes, and the version by which processes see that there are new ones."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, JSONField, Model
from corral.database.sealed import SealedField

STATE = 1


class ValueRow(Model):
    """A setting that was changed at some time. A reset one keeps its row, so that its version goes on growing."""

    name = peewee.CharField(primary_key=True, max_length=80)
    is_set = peewee.BooleanField()
    value = JSONField(null=True)
    sealed = SealedField(null=True)  # the value of a secret, instead
    version = peewee.IntegerField()
    updated_at = InstantField()
    updated_by = IdField(null=True)

    class Meta:
        table_name = "settings_values"


class ChangeRow(Model):
    """One change; of a secret neither value is kept."""

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
    """The only row has the id `STATE`: its version grows with every change, whose units wait for each other here."""

    id = peewee.IntegerField(primary_key=True)
    version = peewee.BigIntegerField()

    class Meta:
        table_name = "settings_state"


class OutdatedRow(Model):
    """A process that goes on with older values of settings that rule from the next start; it renews its row."""

    process = IdField(primary_key=True)
    names = JSONField()
    seen_at = InstantField(index=True)

    class Meta:
        table_name = "settings_outdated"


TABLES = (ValueRow, ChangeRow, StateRow, OutdatedRow)
