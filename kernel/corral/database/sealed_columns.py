"""Finds the columns with sealed values (`corral.crypto`) in all tables, for key statistics and key rotation.

A sealed value in hex begins with two digits for its version and sixteen digits for the id of its master key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import peewee

from corral.database.model import Model
from corral.database.unit import current

VERSION, ID = "01", 16
# Text, because compiling a query for each column would take longer than the rest of the search at every boot.
_KEY_IDS = 'SELECT SUBSTR("{column}", 3, 16) AS id FROM "{table}" WHERE SUBSTR("{column}", 1, 2) = \'01\''


class SealedField(peewee.TextField):
    """A column for a sealed value in hex. Null, and text that does not begin with `01`, count as not sealed.

    Columns of this type are included in key statistics, key rotation and checks.
    """


class SealedColumn:
    """One sealed column of a table with a single-column primary key. Every method runs in the caller's unit of work.

    `is_sealed` is the SQL condition for rows with a sealed value, and `key_id` is the SQL expression for the id of the
    master key that sealed the value. `key_ids` is the statement that selects this id for each of these rows.
    """

    def __init__(self, model: type[Model], field: SealedField) -> None:
        self.field, self.primary_key = field, model._meta.primary_key
        self.model, self.name = model, f"{model._meta.table_name}.{field.name}"
        self.is_sealed = peewee.fn.SUBSTR(field, 1, len(VERSION)) == VERSION
        self.key_id = peewee.fn.SUBSTR(field, len(VERSION) + 1, ID)
        self.key_ids = _KEY_IDS.format(table=model._meta.table_name, column=field.column_name)

    def counts_by_key(self) -> dict[str, int]:
        """Return the number of values in this column that each master key has sealed, keyed by key id."""
        found: Any = self.model.select(self.key_id, peewee.fn.COUNT(self.primary_key)).where(self.is_sealed)
        return {str(key): int(count) for key, count in found.group_by(peewee.SQL("1")).tuples()}


class SealedColumns:
    """All sealed columns of the given models, in the order of the models."""

    def __init__(self, models: Iterable[type[Model]]) -> None:
        self.columns: Sequence[SealedColumn] = [
            SealedColumn(model, field)
            for model in models
            for field in model._meta.sorted_fields
            if isinstance(field, SealedField)
        ]

    def key_ids(self, known: Collection[str]) -> set[str]:
        """Return the ids of the keys that sealed the stored values.

        If a value sealed by one of the `known` keys is found, the search stops, and only the id of this key is
        returned.
        """
        engine, every = current().database.engine, " UNION ALL ".join(column.key_ids for column in self.columns)
        marks = ", ".join([engine.param] * len(known)) or "NULL"
        in_use = f"SELECT id FROM ({every}) AS stored WHERE id IN ({marks}) LIMIT 1"  # noqa: S608  (names of the schema)
        used = engine.execute_sql(in_use, [*known]).fetchall()
        return {row[0] for row in used or engine.execute_sql(every.replace("UNION ALL", "UNION")).fetchall()}

    def counts_by_key(self) -> dict[str, int]:
        """Return the number of values in all columns that each master key has sealed, keyed by key id."""
        found: Counter[str] = Counter()
        for column in self.columns:
            found.update(column.counts_by_key())
        return found
