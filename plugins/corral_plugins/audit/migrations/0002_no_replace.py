"""SQLite deletes a row that `INSERT OR REPLACE` stands in the way of without a word to the trigger for deletions."""

from __future__ import annotations

from typing import Any

import peewee

TRIGGERS = (
    "CREATE TRIGGER audit_rows_no_replace BEFORE INSERT ON audit_rows WHEN EXISTS "
    "(SELECT 1 FROM audit_rows WHERE seq = NEW.seq OR id = NEW.id OR prev_hash = NEW.prev_hash) "
    "BEGIN SELECT RAISE(ABORT, 'rows of the audit log are never changed'); END",
    "CREATE TRIGGER audit_checkpoints_no_replace BEFORE INSERT ON audit_checkpoints WHEN EXISTS "
    "(SELECT 1 FROM audit_checkpoints WHERE seq = NEW.seq) "
    "BEGIN SELECT RAISE(ABORT, 'checkpoints are never changed'); END",
)


def up(migrator: Any, db: Any) -> None:
    if isinstance(db, peewee.SqliteDatabase):
        for trigger in TRIGGERS:
            db.execute_sql(trigger)
