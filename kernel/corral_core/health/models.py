"""The table that stores the last known state of each health check."""

from __future__ import annotations

import peewee

from corral.database.model import InstantField, Model


class HealthRow(Model):
    """The last known state of a health check. `alerted` is true if an alert was raised because the check is down."""

    name = peewee.CharField(primary_key=True, max_length=60)
    status = peewee.CharField(max_length=10)
    since = InstantField()
    alerted = peewee.BooleanField(default=False)

    class Meta:
        table_name = "health_checks"
