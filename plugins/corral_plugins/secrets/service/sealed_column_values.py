"""Reads and replaces the stored values of sealed columns. Every function runs in the caller's unit of work."""

from __future__ import annotations

from typing import Any, NamedTuple

from corral.database.sealed_columns import SealedColumn


class SealedValue(NamedTuple):
    """A stored encrypted value in hexadecimal form, with the primary key of its row."""

    row: Any
    value: str


def values_after(column: SealedColumn, row: Any, limit: int, *, except_key: str = "") -> list[SealedValue]:
    """Return up to `limit` values from rows after the primary key `row`, ordered by primary key.

    If `row` is None, start with the first row. Values sealed under the key `except_key` are omitted.
    """
    key, where = column.primary_key, column.is_sealed & (column.key_id != except_key)
    if row is not None:
        where &= key > row
    found: Any = column.model.select(key, column.field).where(where).order_by(key).limit(limit)
    return [SealedValue(*each) for each in found.tuples()]


def replace_value(column: SealedColumn, old: SealedValue, new: str) -> bool:
    """Replace a value unless it has changed in the meantime. Return whether it was replaced."""
    unchanged = (column.primary_key == old.row) & (column.field == old.value)
    return bool(column.model.update({column.field: new}).where(unchanged).execute())
