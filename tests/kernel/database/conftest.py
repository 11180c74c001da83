"""A database with one table, on each engine, without a kernel around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import peewee
import pytest

from corral.database.connect import connect
from corral.database.engine import Database
from corral.database.model import Model
from corral.database.unit import current
from corral.events import log as event_log
from corral.events.event import Event, emit
from corral.events.log import EventRow
from corral.jobs.job import JobRow


class Note(Model):
    """A row to write."""

    key = peewee.CharField(primary_key=True)
    value = peewee.IntegerField(default=0)

    class Meta:
        table_name = "notes"


@pytest.fixture
def open_database(database_url: str) -> Iterator[Callable[[], Database]]:
    """Open the test's database, as often as wanted (each is like another process)."""
    opened: list[Database] = []

    def make() -> Database:
        database = connect(database_url, pool_size=4)
        opened.append(database)
        return database

    yield make
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[[], Database]) -> Database:
    """The database with its tables."""
    made = open_database()
    made.run(lambda: current().database.engine.create_tables([Note, EventRow, JobRow]))
    return made


class Noted(Event, kw_only=True):
    """A note was made."""

    event = "note.made"

    key: str


def note(key: str, value: int = 0) -> str:
    Note.create(key=key, value=value)
    emit(Noted(key=key), object=("note", key))
    return key


def keys(database: Database) -> set[str]:
    return database.run(lambda: {row.key for row in Note.select()}, read=True)


def events(database: Database) -> list[Any]:
    if database.kind == "postgresql":
        database.run(event_log.number_committed)
    return database.run(lambda: event_log.read(0), read=True)
