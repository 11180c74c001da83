"""Health checks as they were when last looked at."""

from __future__ import annotations

import peewee

from corral.database.model import InstantField, Model


class HealthRow(Model):
    """A check as it was when it was last looked at; `alerted`: admins know that it is down."""

    name = peewee.CharField(primary_key=True, max_length=60)
    status = peewee.CharField(max_length=10)
    since = InstantField()
    alerted = peewee.BooleanField(default=False)

    class Meta:
        table_name = "health_checks"
