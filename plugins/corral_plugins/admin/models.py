"""The table for the kill switch. The stored state survives restarts."""

from __future__ import annotations

import peewee

from corral.database.model import IdField, InstantField, Model

ROW = 1


class KillSwitchRow(Model):
    """The state of the kill switch, in a single row with the id `ROW`. Without a row, the switch is released."""

    id = peewee.IntegerField(primary_key=True)
    engaged = peewee.BooleanField(default=False)
    mode = peewee.CharField(max_length=10, default="pause")
    hold_deliveries = peewee.BooleanField(default=False)
    reason = peewee.TextField(null=True)
    engaged_by = IdField(null=True)
    engaged_at = InstantField(null=True)

    class Meta:
        table_name = "admin_kill_switch"
