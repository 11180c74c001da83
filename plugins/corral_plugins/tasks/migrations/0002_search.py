"""The words of titles and descriptions, for the search: FTS5 on SQLite, a GIN index on PostgreSQL."""

from __future__ import annotations

from typing import Any

import peewee
from peewee import Model


def up(migrator: Any, db: Any) -> None:
    class Document(Model):
        n = peewee.BigAutoField()
        created_at = peewee.CharField(max_length=24)
        task_id = peewee.CharField(max_length=36)

        class Meta:
            database = db
            legacy_table_names = False
            table_name = "tasks_documents"
            indexes = ((("created_at", "task_id"), True),)

    db.create_tables([Document])
    if isinstance(db, peewee.SqliteDatabase):
        db.execute_sql(
            "CREATE VIRTUAL TABLE tasks_search USING fts5("
            "title, description, content='', tokenize='unicode61 remove_diacritics 0', prefix='1 2 3')"
        )
    else:
        db.execute_sql("CREATE TABLE tasks_search (n BIGINT PRIMARY KEY, words tsvector NOT NULL)")
        db.execute_sql("CREATE INDEX tasks_search_words ON tasks_search USING gin (words)")
