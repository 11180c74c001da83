"""The columns that hold sealed values (`corral.crypto`), of all tables: for counts by key, and for a change of keys.

A sealed value in hex begins with two digits for its form and sixteen for the id of the master key that opens it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import peewee

from corral.database.model import Model

FORM, ID = "01", 16


class SealedField(peewee.TextField):
    """A sealed value in hex; null, or plain text that does not begin with `01`, where nothing is sealed.

    A column of this type is counted, rewrapped and checked with all others: declare it and it is done.
    """


class Sealed(NamedTuple):
    """A stored value: the key of its row, and the value in hex."""

    row: Any
    value: str


class SealedColumn:
    """One column of a table with a single primary key; every method joins the unit."""

    def __init__(self, model: type[Model], field: SealedField) -> None:
        self._field, self._key = field, model._meta.primary_key
        self.model, self.name = model, f"{model._meta.table_name}.{field.name}"
        self._is_sealed = peewee.fn.SUBSTR(field, 1, len(FORM)) == FORM
        self._key_id = peewee.fn.SUBSTR(field, len(FORM) + 1, ID)

    def counts(self) -> dict[str, int]:
        """Values by the id of their master key."""
        found: Any = self.model.select(self._key_id, peewee.fn.COUNT(self._key)).where(self._is_sealed)
        return {str(key): int(count) for key, count in found.group_by(peewee.SQL("1")).tuples()}

    def has(self, key_ids: Collection[str]) -> str | None:
        """One of these ids that some value carries."""
        found = self.model.select(self._key_id).where(self._is_sealed & self._key_id.in_(list(key_ids)))
        row = found.limit(1).tuples().first() if key_ids else None
        return None if row is None else str(row[0])

    def after(self, row: Any, at_once: int, *, but: str = "") -> list[Sealed]:
        """Values in the order of their rows, from the one after `row` (None: the first), without those of key `but`."""
        where = self._is_sealed & (self._key_id != but)
        if row is not None:
            where &= self._key > row
        found: Any = self.model.select(self._key, self._field).where(where).order_by(self._key).limit(at_once)
        return [Sealed(*each) for each in found.tuples()]

    def replace(self, old: Sealed, new: str) -> bool:
        """Store another form of a value, unless it was changed meanwhile."""
        mine = (self._key == old.row) & (self._field == old.value)
        return bool(self.model.update({self._field: new}).where(mine).execute())


class SealedColumns:
    """All of them, in the order of the plugins."""

    def __init__(self, models: Iterable[type[Model]]) -> None:
        self.columns: Sequence[SealedColumn] = [
            SealedColumn(model, field)
            for model in models
            for field in model._meta.sorted_fields
            if isinstance(field, SealedField)
        ]

    def key_ids(self, known: Collection[str]) -> set[str]:
        """The ids that stored values carry; as soon as one is `known`, that one alone."""
        found: set[str] = set()
        for column in self.columns:
            if (one := column.has(known)) is not None:
                return {one}
            found |= set(column.counts())
        return found

    def counts(self) -> dict[str, int]:
        """Values by the id of their master key, of all columns together."""
        found: dict[str, int] = {}
        for column in self.columns:
            for key, count in column.counts().items():
                found[key] = found.get(key, 0) + count
        return found
