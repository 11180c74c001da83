"""Removes what a plugin keeps in the database: its tables, its migration history, its rows in the kernel's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peewee

from corral.database.engine import Database
from corral.database.migrations import own_connection, schema_lock

# Kernel tables whose rows are named `<plugin>.<what>`, and the one whose rows are named like the plugin.
NAMED = ("kernel_consumers", "kernel_schedules", "kernel_jobs")
STATES = "plugin_admin_states"


def tables_of(database: Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """The plugin's tables, history included. `plugins`: all known names: `agent_x` may be a plugin beside `agent`."""
    with own_connection(database) as engine:
        return _tables(engine, plugin, plugins)


def purge(database: Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """Drop them, in one transaction under the lock of migrations; returns their names. The plugin must not run."""
    engine: Any
    with own_connection(database) as engine, schema_lock(engine), engine.atomic():
        names = _tables(engine, plugin, plugins)
        known = set(engine.get_tables())
        if database.kind == "sqlite":
            for name in sorted(names, key=len):  # a virtual table takes its shadows, whose names are longer, with it
                engine.execute_sql(f'DROP TABLE IF EXISTS "{name}"')
        elif names:
            listed = ", ".join(f'"{name}"' for name in names)
            engine.execute_sql(f"DROP TABLE {listed} CASCADE")
        mark = engine.param
        for table in known.intersection(NAMED):
            beginning = f"{plugin}."
            sql = f"DELETE FROM {table} WHERE substr(name, 1, {len(beginning)}) = {mark}"  # noqa: S608  (a kernel table)
            engine.execute_sql(sql, (beginning,))
        if STATES in known:
            engine.execute_sql(f"DELETE FROM {STATES} WHERE name = {mark}", (plugin,))  # noqa: S608  (a kernel table)
        return names


def _tables(engine: peewee.Database, plugin: str, plugins: Iterable[str]) -> list[str]:
    """By prefix, but none of a plugin whose longer name begins alike, installed or once migrated here."""
    tables = engine.get_tables()
    others = {*plugins, *(name.removesuffix("_migrations") for name in tables if name.endswith("_migrations"))}
    longer = tuple(f"{name}_" for name in others if name.startswith(f"{plugin}_"))
    own = [name for name in tables if name == plugin or name.startswith(f"{plugin}_")]
    return sorted(name for name in own if not (longer and name.startswith(longer)))
