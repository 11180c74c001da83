"""The columns of all tables that contain sealed values (`corral.crypto`), for key statistics and key rotation.

A sealed value in hex begins with two digits for its version and sixteen digits for the id of its master key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import peewee

from corral.database.model import Model

VERSION, ID = "01", 16


class SealedField(peewee.TextField):
    """A column for a sealed value in hex. Null, and text that does not begin with `01`, are treated as not sealed.

    Columns of this type are included in key statistics, key rotation and checks.
    """


class SealedColumn:
    """One sealed column of a table with a single-column primary key. Every method runs in the caller's unit of work.

    `is_sealed` is the condition for rows with a sealed value, and `key_id` the expression for the id of its master key.
    """

    def __init__(self, model: type[Model], field: SealedField) -> None:
        self.field, self.primary_key = field, model._meta.primary_key
        self.model, self.name = model, f"{model._meta.table_name}.{field.name}"
        self.is_sealed = peewee.fn.SUBSTR(field, 1, len(VERSION)) == VERSION
        self.key_id = peewee.fn.SUBSTR(field, len(VERSION) + 1, ID)

    def counts_by_key(self) -> dict[str, int]:
        """Return how many values of the column each master key has sealed, by key id."""
        found: Any = self.model.select(self.key_id, peewee.fn.COUNT(self.primary_key)).where(self.is_sealed)
        return {str(key): int(count) for key, count in found.group_by(peewee.SQL("1")).tuples()}

    def find_key_in_use(self, key_ids: Collection[str]) -> str | None:
        """Return one of the given key ids whose key has sealed a stored value, or None if there is no such key."""
        found = self.model.select(self.key_id).where(self.is_sealed & self.key_id.in_(list(key_ids)))
        row = found.limit(1).tuples().first() if key_ids else None
        return None if row is None else str(row[0])


class SealedColumns:
    """All sealed columns, in the order of the plugins."""

    def __init__(self, models: Iterable[type[Model]]) -> None:
        self.columns: Sequence[SealedColumn] = [
            SealedColumn(model, field)
            for model in models
            for field in model._meta.sorted_fields
            if isinstance(field, SealedField)
        ]

    def key_ids(self, known: Collection[str]) -> set[str]:
        """Return the ids of the keys that sealed the stored values.

        If the search finds a value that one of the `known` keys sealed, it stops and returns only the id of this key.
        """
        found: set[str] = set()
        for column in self.columns:
            if (one := column.find_key_in_use(known)) is not None:
                return {one}
            found |= set(column.counts_by_key())
        return found

    def counts_by_key(self) -> dict[str, int]:
        """Return how many values of all columns each master key has sealed, by key id."""
        found: Counter[str] = Counter()
        for column in self.columns:
            found.update(column.counts_by_key())
        return found
