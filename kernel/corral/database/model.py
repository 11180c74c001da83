"""Models: peewee, bound to whatever unit of work is running, so that one process may hold several kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import peewee

from corral.database.unit import current


class _UnitProxy(peewee.DatabaseProxy):
    """Resolves to the engine of the running unit; a query outside a unit is `NoUnit`."""

    __slots__ = ()

    def __init__(self) -> None:
        """peewee's own would store the engine; this one is asked for at each use."""

    @property
    def obj(self) -> Any:
        return current().database.engine

    def attach_callback(self, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return callback


UNIT = _UnitProxy()

PRIVATE, SHARED, ADMIN = "private", "shared", "admin"


class Model(peewee.Model):
    """Base of every table. `visibility`: the class of its objects; private and shared ones name their owner column."""

    visibility = ADMIN
    owner_field: str | None = None

    class Meta:
        database = UNIT
        legacy_table_names = False


class JSONField(peewee.TextField):
    """Any JSON value, kept as text on both engines, so that both give the same bytes."""

    def db_value(self, value: Any) -> str | None:
        return None if value is None else msgspec.json.encode(value).decode()

    def python_value(self, value: str | None) -> Any:
        return None if value is None else msgspec.json.decode(value)


class IdField(peewee.CharField):
    """A UUIDv7 of 36 characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=36, **options)


class InstantField(peewee.CharField):
    """An instant of `corral.clock`: 24 characters that sort by time."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=24, **options)


def raw(text: str | None) -> msgspec.Raw | None:
    """A JSON column as read by a compiled statement, to be put into an answer without parsing it."""
    return None if text is None else msgspec.Raw(text)
