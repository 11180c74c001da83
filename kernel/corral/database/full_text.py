"""Full-text search with an index that maps words to document numbers.

SQLite uses FTS5, and PostgreSQL uses a GIN index.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peewee

from corral.database.dialect import execute, on_sqlite

# Words consist of letters and digits, as in FTS5's tokenizer. The dictionary `simple` neither stems nor drops words.
_WORDS = "to_tsvector('simple', regexp_replace({text}, '[^[:alnum:]]+', ' ', 'g'))"


class FullTextIndex:
    """A full-text index over the text columns of documents, which have ascending numbers and are stored elsewhere.

    A document matches when each search word is a prefix of one of its words, ignoring case. The cost of a search does
    not depend on the number of documents. Every method except `create` runs in the caller's unit of work.
    """

    def __init__(self, table: str, *columns: str) -> None:
        self._table, self._columns = table, ", ".join(columns)

    def create(self, database: peewee.Database) -> None:
        """Create the index table. Migrations call this method."""
        if on_sqlite(database):  # contentless, because FTS5 would otherwise store another copy of every text
            options = "content='', tokenize='unicode61 remove_diacritics 0', prefix='1 2 3'"
            database.execute_sql(f"CREATE VIRTUAL TABLE {self._table} USING fts5({self._columns}, {options})")
            database.execute_sql(f"INSERT INTO {self._table} ({self._table}, rank) VALUES ('usermerge', 2)")  # noqa: S608
        else:
            database.execute_sql(f"CREATE TABLE {self._table} (n BIGINT PRIMARY KEY, words tsvector NOT NULL)")
            database.execute_sql(f"CREATE INDEX {self._table}_words ON {self._table} USING gin (words)")

    def add(self, select: str, parameters: Sequence[Any]) -> None:
        """Index the documents that the SQL query `select` returns.

        Each row of the result consists of a document's number, followed by its text columns.
        """
        if on_sqlite():
            execute(f"INSERT INTO {self._table} (rowid, {self._columns}) {select}", parameters)
            return
        words = _WORDS.format(text=self._columns.replace(", ", " || ' ' || "))
        source = f"SELECT n, {words} FROM ({select}) AS document (n, {self._columns})"  # noqa: S608  (names of the schema)
        execute(f"INSERT INTO {self._table} (n, words) {source} ON CONFLICT DO NOTHING", parameters)

    def remove(self, number: int, texts: Sequence[str]) -> None:
        """Remove a document. Pass the indexed texts, because a contentless FTS5 table does not store them."""
        if on_sqlite():
            values = f"'delete', ?{', ?' * len(texts)}"
            sql = f"INSERT INTO {self._table} ({self._table}, rowid, {self._columns}) VALUES ({values})"  # noqa: S608
            execute(sql, [number, *texts])
        else:
            execute(f"DELETE FROM {self._table} WHERE n = ?", [number])  # noqa: S608  (names of the schema)

    def merge(self) -> None:
        """Merge segments of the index for a few milliseconds. Does nothing on PostgreSQL.

        On SQLite, each transaction that adds documents adds a segment, and a search has to read all segments. SQLite
        itself merges segments only when there are four of about the same size. If little is left to merge, this
        method does nothing.
        """
        if on_sqlite():
            execute(f"INSERT INTO {self._table} ({self._table}, rank) VALUES ('merge', 50)", [])  # noqa: S608

    def query(self, words: Sequence[str], *, enough: int) -> str:
        """Return a query, in the engine's query language, for the documents that contain all of these words.

        The words must consist of letters and digits.

        SQLite collects all matches of a prefix before it returns the first one, but reads the matches of a whole word
        one by one. On SQLite, a word that occurs in at least `enough` documents is therefore searched for as a whole
        word.
        """
        if not on_sqlite():
            return " & ".join(f"'{word}':*" for word in words)
        whole = [f'"{word}"' for word in words]
        return " ".join(word if self.count(word, limit=enough) >= enough else f"{word}*" for word in whole)

    def match_sql(self, *, up_to: bool = False) -> str:
        """Return SQL that selects the document number of each matching document as `n`, highest first.

        The parameters of the SQL are the query, the highest document number to include (only if `up_to` is set), and
        the maximum number of rows. The caller may append `OFFSET ?`.
        """
        number = "rowid" if on_sqlite() else "n"
        condition = f"{self._table} MATCH ?" if on_sqlite() else "words @@ to_tsquery('simple', ?)"
        older = f"AND {number} <= ? " if up_to else ""
        return f"SELECT {number} AS n FROM {self._table} WHERE {condition} {older}ORDER BY {number} DESC LIMIT ?"  # noqa: S608

    def count(self, query: str, *, limit: int) -> int:
        """Return the number of matching documents, but at most `limit`."""
        sql = f"SELECT COUNT(*) FROM ({self.match_sql()}) AS found"  # noqa: S608  (names of the schema)
        return int(execute(sql, [query, limit]).fetchone()[0])
