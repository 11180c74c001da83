"""Peewee models bound to the current unit of work, so that one process can run several kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import peewee

from corral.database.unit import current


class _UnitProxy(peewee.DatabaseProxy):
    """A proxy for the engine of the current unit of work. A query outside a unit raises `NoUnit`."""

    __slots__ = ()

    def __init__(self) -> None:
        """Skip peewee's initialisation, which would store the engine. This proxy looks up the engine on each use."""

    @property
    def obj(self) -> Any:
        return current().database.engine

    def attach_callback(self, callback: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return callback


UNIT = _UnitProxy()

PRIVATE, SHARED, ADMIN, PRIVATE_AND_ADMIN = VISIBILITIES = ("private", "shared", "admin", "private_and_admin")


class Model(peewee.Model):
    """Base class of all models.

    `visibility` determines who may read the objects that are stored in the table. A table of private or shared objects
    must name its owner column in `owner_field`.
    """

    visibility = ADMIN
    owner_field: str | None = None

    class Meta:
        database = UNIT
        legacy_table_names = False


class JSONField(peewee.TextField):
    """A column for any JSON value. The value is stored as text, so that both engines return the same bytes.

    None is stored as NULL, or as the text `null` if the column must not be NULL.
    """

    def db_value(self, value: Any) -> str | None:
        return None if value is None and self.null else msgspec.json.encode(value).decode()

    def python_value(self, value: str | None) -> Any:
        return None if value is None else msgspec.json.decode(value)


class IdField(peewee.CharField):
    """A column for a UUIDv7, which has 36 characters."""

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=36, **options)


class InstantField(peewee.CharField):
    """A column for an instant (see `corral.clock`).

    Instants have 24 characters, and their alphabetical order is chronological.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(max_length=24, **options)
