"""The table of `backup`: when the last backup was made."""

from __future__ import annotations

import peewee

from corral.database.model import InstantField, Model

ROW = 1


class LastBackupRow(Model):
    """The last backup of this installation. The table has at most one row, with the id 1."""

    id = peewee.IntegerField(primary_key=True)
    finished_at = InstantField()

    class Meta:
        table_name = "backup_last"
