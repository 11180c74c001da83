"""The table of the `backup` plugin, which stores the time of the last backup."""

from __future__ import annotations

import peewee

from corral.database.model import InstantField, Model

ROW = 1


class LastBackupRow(Model):
    """The last backup of this installation. The table has at most one row, whose id is 1."""

    id = peewee.IntegerField(primary_key=True)
    finished_at = InstantField()

    class Meta:
        table_name = "backup_last"
