"""Full text search: an index of words by document number, on SQLite by FTS5 and on PostgreSQL by a GIN index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peewee

from corral.database.dialect import execute, on_sqlite

# Letters and digits are words, as in FTS5's tokenizer; the dictionary `simple` neither stems nor drops any.
_WORDS = "to_tsvector('simple', regexp_replace({text}, '[^[:alnum:]]+', ' ', 'g'))"


class FullTextIndex:
    """The words of the text columns of documents, which have ascending numbers and are stored elsewhere.

    A document matches when each word of a search begins one of its words, without regard to case. A search costs the
    same whatever the number of documents. Every method but `create` joins the unit of work.
    """

    def __init__(self, table: str, *columns: str) -> None:
        self._table, self._columns = table, columns

    def create(self, database: peewee.Database) -> None:
        """Create the table. For migrations."""
        if on_sqlite(database):  # without the content: FTS5 would keep another copy of every text
            columns, options = ", ".join(self._columns), "tokenize='unicode61 remove_diacritics 0', prefix='1 2 3'"
            database.execute_sql(f"CREATE VIRTUAL TABLE {self._table} USING fts5({columns}, content='', {options})")
        else:
            database.execute_sql(f"CREATE TABLE {self._table} (n BIGINT PRIMARY KEY, words tsvector NOT NULL)")
            database.execute_sql(f"CREATE INDEX {self._table}_words ON {self._table} USING gin (words)")

    def add(self, select: str, parameters: Sequence[Any]) -> None:
        """Index the documents that the SQL `select` gives: for each its number, then its texts in order."""
        columns = ", ".join(self._columns)
        if on_sqlite():
            execute(f"INSERT INTO {self._table} (rowid, {columns}) {select}", parameters)
            return
        words = _WORDS.format(text=" || ' ' || ".join(self._columns))
        source = f"SELECT n, {words} FROM ({select}) AS document (n, {columns})"  # noqa: S608  (names of the schema)
        execute(f"INSERT INTO {self._table} (n, words) {source} ON CONFLICT DO NOTHING", parameters)

    def remove(self, number: int, texts: Sequence[str]) -> None:
        """Take out a document with the texts that were indexed: FTS5 without content cannot look them up."""
        if on_sqlite():
            columns, markers = ", ".join(self._columns), ", ?" * len(self._columns)
            sql = f"INSERT INTO {self._table} ({self._table}, rowid, {columns}) VALUES ('delete', ?{markers})"  # noqa: S608
            execute(sql, [number, *texts])
        else:
            execute(f"DELETE FROM {self._table} WHERE n = ?", [number])  # noqa: S608  (names of the schema)

    def query(self, words: Sequence[str], *, enough: int) -> str:
        """A search for words of letters and digits, in the engine's language.

        SQLite collects every match of a prefix before it gives the first, but reads those of a whole word one by
        one. So a word that `enough` documents have is searched for as a whole.
        """
        if not on_sqlite():
            return " & ".join(f"'{word}':*" for word in words)
        whole = [f'"{word}"' for word in words]
        return " ".join(word if self.count(word, limit=enough) >= enough else f"{word}*" for word in whole)

    def matches(self, *, up_to: bool = False) -> str:
        """SQL for the numbers `n` that match, highest first.

        Its parameters are the query, the highest number if `up_to`, and the limit; it may be followed by `OFFSET ?`.
        """
        number = "rowid" if on_sqlite() else "n"
        condition = f"{self._table} MATCH ?" if on_sqlite() else "words @@ to_tsquery('simple', ?)"
        older = f"AND {number} <= ? " if up_to else ""
        return f"SELECT {number} AS n FROM {self._table} WHERE {condition} {older}ORDER BY {number} DESC LIMIT ?"  # noqa: S608

    def count(self, query: str, *, limit: int) -> int:
        """The number of matches, exact up to `limit`."""
        sql = f"SELECT COUNT(*) FROM ({self.matches()}) AS found"  # noqa: S608  (names of the schema)
        return int(execute(sql, [query, limit]).fetchone()[0])
